// A part of the page that looks again and again says when what is seen may be old, and why. What a person asked for
// has its answer elsewhere.
const isLook = (told) => told.detail.requestConfig.elt.matches(".live");

const why = () => document.getElementById("why");

document.addEventListener("htmx:beforeSwap", (told) => {
  if (told.detail.isError && isLook(told)) told.detail.target = why();
});

document.addEventListener("htmx:afterRequest", (told) => {
  const { successful, requestConfig } = told.detail; // successful: undefined where nobody answered
  if (isLook(told)) {
    document.body.classList.toggle("stale", !successful);
    if (successful !== false) why().replaceChildren();
  } else if (requestConfig.verb === "post") {
    htmx.trigger(document.body, "virnucpro:changed");
  }
});
