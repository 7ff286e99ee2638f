// What is on the page may be old while the server does not answer: say so.
for (const [event, stale] of [["htmx:sendError", true], ["htmx:responseError", true], ["htmx:afterOnLoad", false]]) {
  document.addEventListener(event, (told) => {
    const failed = stale && !(told.detail.xhr.status >= 400 && told.detail.xhr.status < 500);
    document.body.classList.toggle("stale", failed);
  });
}
