// A part of the page that looks again and again says when what is seen may be old, and why. What a person asked for
// has its answer elsewhere.
const isLook = (told) => told.detail.requestConfig.elt.matches(".live");

document.addEventListener("htmx:beforeSwap", (told) => {
  if (told.detail.isError && isLook(told)) told.detail.target = document.getElementById("why");
});

document.addEventListener("htmx:afterRequest", (told) => {
  if (isLook(told)) document.body.classList.toggle("stale", !told.detail.successful);
  else if (told.detail.requestConfig.verb === "post") htmx.trigger(document.body, "virnucpro:changed");
});
