"use strict";
// One pair at a time. A choice is kept in the tab until the server has confirmed that it is on the disk, and is sent again until then.
(() => {
  const element = (id) => document.getElementById(id);
  const RETRY = 1000;
  const random = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  const tab = sessionStorage.getItem("tab") || random();
  sessionStorage.setItem("tab", tab);
  let load = random(), labeller = "", task = null, last = "", busy = false;

  const notice = (text) => {
    element("notice").textContent = text;
    element("notice").hidden = !text;
  };
  const pause = () => new Promise((resolve) => setTimeout(resolve, RETRY));

  // Ask until the server answers. A refusal is returned with its sentence. A server that was started again has another token.
  async function ask(path, body) {
    for (;;) {
      try {
        const response = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ tab, labeller, ...body }) });
        if (response.status === 401) return { ok: false, status: 401, answer: { error: "Open the address that the command printed, in this tab. Nothing is lost." } };
        const answer = await response.json();
        if (response.status === 507) throw new Error(answer.error);
        return { ok: response.ok, status: response.status, answer };
      } catch (error) {
        const reason = error instanceof TypeError ? "The server does not answer." : error.message;
        notice(`${reason} Nothing is lost: the page tries again until it does.`);
        await pause();
      }
    }
  }

  function turns(place, list) {
    place.replaceChildren();
    for (const turn of list) {
      if (turn.role) place.append(Object.assign(document.createElement("small"), { textContent: turn.role }));
      place.append(Object.assign(document.createElement("p"), { textContent: turn.content, dir: "auto" }));
    }
  }

  function show(state) {
    task = state.task;
    last = state.last;
    element("count").textContent = `${state.done} of ${state.total}`;
    element("bar").max = Math.max(state.total, 1);
    element("bar").value = state.done;
    element("pair").hidden = task === null;
    element("end").hidden = task !== null;
    if (task !== null) {
      turns(element("prompt"), task.prompt);
      turns(element("first"), task.first);
      turns(element("second"), task.second);
      element("comment").value = "";
      scrollTo(0, 0);
    } else {
      const left = state.total - state.done;
      element("ended").textContent = left > 0
        ? `${left} ${left === 1 ? "pair is" : "pairs are"} open in another tab or wait for others. Close that tab, or label there.`
        : "All pairs are labelled. Thank you.";
    }
    element("agreement").hidden = state.agreement.length === 0;
    const items = state.agreement.map((text) => Object.assign(document.createElement("li"), { textContent: text }));
    element("agreement").querySelector("ul").replaceChildren(...items);
  }

  async function next() {
    const { ok, answer } = await ask("/api/next", { load });
    if (ok) show(answer);
    else notice(answer.error);
    return ok;
  }

  // Send what was chosen; where the page was closed before it was confirmed, after it is opened again.
  async function confirm() {
    const pending = sessionStorage.getItem("pending");
    if (!pending) return;
    const { ok, status, answer } = await ask("/api/label", JSON.parse(pending));
    if (status !== 401) sessionStorage.removeItem("pending");
    notice(ok ? "" : answer.error);
  }

  async function working(action) {
    if (busy) return;
    busy = true;
    document.body.dataset.busy = "";
    try { await action(); } finally {
      busy = false;
      delete document.body.dataset.busy;
    }
  }

  const choose = (choice) => working(async () => {
    if (task === null) return;
    const pending = { labeller, id: random(), task: task.id, choice, comment: element("comment").value };
    sessionStorage.setItem("pending", JSON.stringify(pending));
    element("comment").blur();
    await confirm();
    await next();
  });

  const undo = () => working(async () => {
    const { ok, answer } = await ask("/api/undo", { label: last });
    notice(ok ? "The last label is undone. This is its pair." : answer.error);
    if (ok) show(answer);
  });

  const begin = (name) => working(async () => {
    labeller = name.trim();
    element("rename").textContent = labeller;
    element("who").hidden = true;
    element("work").hidden = false;
    await confirm();
    if (await next()) localStorage.setItem("labeller", labeller);
    else rename();
  });

  function rename() {
    element("who").hidden = false;
    element("work").hidden = true;
    element("name").value = labeller;
    element("name").focus();
    element("name").select();
  }

  element("who").addEventListener("submit", (event) => {
    event.preventDefault();
    begin(element("name").value);
  });
  element("rename").addEventListener("click", rename);
  element("undo").addEventListener("click", undo);
  element("undo-last").addEventListener("click", undo);
  element("again").addEventListener("click", () => working(next));
  for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => choose(button.dataset.choice));

  const KEYS = { 1: "first", 2: "second", t: "tie", b: "both_bad", s: "skip" };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.target === element("comment")) {
      if (event.key === "Enter" || event.key === "Escape") element("comment").blur();
      return;
    }
    if (event.target.closest("input, select, textarea") || element("work").hidden) return;
    if (event.key in KEYS) choose(KEYS[event.key]);
    else if (event.key === "u") undo();
    else if (event.key === "c" && task !== null) {
      event.preventDefault();
      element("comment").focus();
    }
  });
  addEventListener("pagehide", () => {
    navigator.sendBeacon("/api/release", new Blob([JSON.stringify({ tab, load })], { type: "application/json" }));
  });
  addEventListener("pageshow", (event) => {
    if (!event.persisted) return;
    load = random();
    working(next);
  });

  const known = localStorage.getItem("labeller");
  if (known) begin(known);
  else element("name").focus();
})();
