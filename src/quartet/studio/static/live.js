"use strict";
// Fetches the page again while its run goes on, and puts the parts marked data-live in place of the old ones.
(() => {
  const written = new Map(); // the parts as the server wrote them: what a reader opened or ticked is no change
  const parts = () => document.querySelectorAll("[data-live]");
  for (const part of parts()) written.set(part.id, part.outerHTML);

  const same = (a, b) => a.tagName === b.tagName && ["href", "value", "textContent"].every((key) => a[key] === b[key]);

  function replace(part, fresh) {
    const ticked = [...part.querySelectorAll("input:checked")].map((input) => input.value);
    const closed = [...part.querySelectorAll("details")].map((details) => details.open);
    const focused = part.contains(document.activeElement) ? document.activeElement : null;
    for (const input of fresh.querySelectorAll("input[type=checkbox]")) input.checked = ticked.includes(input.value);
    fresh.querySelectorAll("details").forEach((details, i) => { details.open = closed[i] ?? details.open; });
    part.replaceWith(fresh);
    if (focused) [...fresh.querySelectorAll("a, button, input, summary")].find((each) => same(each, focused))?.focus();
  }

  async function renew() {
    const begun = performance.now();
    const answer = document.hidden ? null : await fetch(location.href).catch(() => null);
    if (answer?.ok) {
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const part of parts()) {
        const fresh = page.getElementById(part.id);
        if (!fresh || fresh.outerHTML === written.get(part.id)) continue;
        written.set(part.id, fresh.outerHTML);
        replace(part, document.importNode(fresh, true));
      }
      document.body.dataset.every = page.body.dataset.every ?? "";
      dispatchEvent(new CustomEvent("renewed", { detail: page }));
    }
    next(performance.now() - begun);
  }

  function next(took = 0) {
    const seconds = Number(document.body.dataset.every); // none: the run has ended
    if (seconds) setTimeout(renew, Math.max(1000 * seconds, 5 * took)); // a long run's page is costly
  }
  next();
})();
