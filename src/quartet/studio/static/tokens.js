"use strict";
// The inspector: the text coloured by any of its numbers, one token in detail, and curves aligned with the tokens.
(() => {
  const root = document.getElementById("inspector");
  const place = document.getElementById("tokens");
  const column = document.getElementById("column");
  const { run, kind, sample } = root.dataset;
  let view = JSON.parse(document.getElementById("inspector-data").textContent);
  let chosen = view.begin < view.texts.length ? view.begin : 0;
  const UP = "59,130,246", DOWN = "245,158,11";

  const show = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const text = size !== 0 && (size < 0.001 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
    return text.replace("-", "−");
  };
  const described = (name) => view.columns.find((c) => c.name === name);

  function range(name) {
    const { scale } = described(name);
    const there = view.numbers[name].filter((v) => v !== null).map((v) => Math.abs(scale === "one" ? v - 1 : v)).sort((a, b) => a - b);
    return there.length ? there[Math.min(there.length - 1, Math.floor(there.length * 0.97))] || 1e-9 : 1;
  }

  function paint() {
    if (!view.columns.length) return; // nothing in it is the policy's
    const name = column.value;
    const { scale } = described(name);
    const most = range(name);
    const strongest = window.isDark() ? 0.42 : 0.7; // text stays readable on it
    [...place.children].forEach((span, i) => {
      const value = view.numbers[name][i];
      const size = value === null ? 0 : Math.min(1, Math.abs(scale === "one" ? value - 1 : value) / most);
      const up = scale === "one" ? value > 1 : value > 0;
      span.style.backgroundColor = size < 0.02 ? "" : `rgba(${up ? UP : DOWN},${(0.08 + (strongest - 0.08) * size).toFixed(3)})`;
    });
    const middle = scale === "one" ? 1 : 0;
    const legend = document.getElementById("legend");
    legend.replaceChildren();
    for (const [value, color] of [[middle - most, DOWN], [middle + most, UP]]) {
      if (value < middle && !view.numbers[name].some((v) => v !== null && v < middle)) continue;
      if (value > middle && !view.numbers[name].some((v) => v !== null && v > middle)) continue;
      const chip = document.createElement("span");
      chip.className = "chip";
      chip.style.backgroundColor = `rgba(${color},${strongest})`;
      chip.textContent = show(value);
      legend.append(chip);
    }
  }

  function write() {
    const spans = document.createDocumentFragment();
    view.texts.forEach((text, i) => {
      const span = document.createElement("span");
      span.className = view.own[i] ? "token" : "token given";
      if (view.clipped[i]) span.classList.add("clipped");
      span.dataset.i = i;
      span.id = `token-${i}`;
      span.setAttribute("role", "option");
      span.textContent = text === "" ? "∅" : text.replaceAll("\n", "⏎\n");
      spans.append(span);
    });
    place.removeAttribute("dir"); // or the browser looks for the direction again at each of thousands of tokens
    place.replaceChildren(spans);
    place.dir = "auto";
    const before = column.value;
    column.replaceChildren(...view.columns.map((c) => new Option(c.label, c.name)));
    column.value = view.columns.some((c) => c.name === before) ? before : view.columns[0]?.name ?? "";
  }

  function detail() {
    const i = chosen;
    if (!place.children.length) return;
    document.querySelector(".token.chosen")?.removeAttribute("aria-selected");
    document.querySelector(".token.chosen")?.classList.remove("chosen");
    const span = place.children[i];
    span.classList.add("chosen");
    span.setAttribute("aria-selected", "true");
    place.setAttribute("aria-activedescendant", span.id);
    span.scrollIntoView({ block: "nearest" });
    const name = document.getElementById("token-name");
    const signs = { "\n": "⏎", "\t": "⇥", " ": "␣" };
    name.textContent = `“${view.texts[i].trim() || view.texts[i].replace(/[\n\t ]/g, (c) => signs[c]) || "∅"}”`;
    const small = document.createElement("small");
    const part = view.texts[i].includes("\ufffd") ? ", has a part of a character" : ""; // bytes that are no UTF-8 alone
    small.textContent = ` id ${view.ids[i]}, position ${i}${part}`;
    name.append(small);
    document.getElementById("case").textContent = view.own[i] ? view.cases[i] : "Given, not written by the policy: it is not trained on.";
    const rows = [];
    if (view.own[i]) {
      const { penalty, reward } = view.numbers;
      for (const c of view.columns) {
        const row = document.createElement("tr");
        row.dataset.column = c.name;
        const head = document.createElement("th");
        head.scope = "row";
        head.textContent = c.label;
        head.title = c.what;
        const cell = document.createElement("td");
        cell.textContent = show(view.numbers[c.name][i]);
        row.append(head, cell);
        rows.push(row);
        if (c.name === "reward" && view.apart && penalty && penalty[i] !== null) {
          const apart = document.createElement("tr");
          apart.className = "apart";
          const label = document.createElement("th");
          label.textContent = "without the KL penalty";
          const value = document.createElement("td");
          value.textContent = show(reward[i] - penalty[i]);
          apart.append(label, value);
          rows.push(apart);
        }
      }
    }
    document.querySelector("#detail tbody").replaceChildren(...rows);
    mark();
    if (kind.endsWith("probes")) history();
  }

  function curves() {
    const own = view.own.map((mine, i) => (mine ? i : -1)).filter((i) => i >= 0);
    if (!own.length) return;
    const pick = (name) => own.map((i) => view.numbers[name]?.[i] ?? null);
    const has = (name) => view.numbers[name]?.some((v) => v !== null);
    const text = own.map((i) => view.texts[i].replaceAll("&", "&amp;").replaceAll("<", "&lt;")); // Plotly reads tags
    const line = (name, label, axis, color, more = {}) => ({ type: "scatter", mode: own.length > 1 ? "lines" : "markers", x: own, y: pick(name), text, name: label, yaxis: axis, line: { color, width: 1.6 }, hovertemplate: "%{text}: %{y:.3g}", ...more });
    const long = own.length > 2000; // a bar or a marker is an element of its own: tens of thousands take a minute
    const bars = (name, label, axis, color) => (long ? line(name, label, axis, Array.isArray(color) ? `rgb(${UP})` : color) : { type: "bar", x: own, y: pick(name), text, textposition: "none", name: label, yaxis: axis, marker: { color }, hovertemplate: "%{text}: %{y:.3g}" });
    const panels = [];
    if (has("value")) panels.push(["value", [line("value", "value", "", "#3b82f6"), line("return", "return", "", "#059669", { line: { color: "#059669", width: 1.6, dash: "dot" } })]]);
    if (has("reward")) panels.push(["reward", [bars("reward", "reward", "", "#8b5cf6")]]);
    if (has("advantage")) panels.push(["advantage", [bars("advantage", "advantage", "", pick("advantage").map((v) => `rgb(${v > 0 ? UP : DOWN})`))]]);
    const logprobs = [["old_logprob", "old", "#8a8f98"], ["ref_logprob", "reference", "#d97706"], ["logprob", "now", "#3b82f6"]].filter(([n]) => has(n));
    panels.push(["log-prob", logprobs.map(([n, label, color]) => line(n, label, "", color))]);
    if (has("ratio")) panels.push(["ratio", [line("ratio", "ratio", "", "#ef4444", { mode: long ? "lines" : "lines+markers", marker: { size: own.map((i) => (view.clipped[i] ? 8 : 3)), color: "#ef4444" } })]]);
    const data = [], gap = 0.045, height = (1 - gap * (panels.length - 1)) / panels.length;
    const color = getComputedStyle(document.body).color;
    const grid = "rgba(128,128,128,0.18)";
    const layout = { height: 118 * panels.length + 20, margin: { l: 64, r: 8, t: 16, b: 30 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "x unified", font: { color, size: 11, family: "system-ui, sans-serif" }, xaxis: { showticklabels: false, title: { text: "tokens of the response", font: { size: 11 } }, gridcolor: grid, zeroline: false, range: [own[0] - 0.6, own[own.length - 1] + 0.6] }, hoverlabel: { bgcolor: window.isDark() ? "#1f2430" : "#ffffff", font: { color } }, shapes: [], annotations: [] };
    panels.forEach(([title, lines], p) => {
      const key = p === 0 ? "yaxis" : `yaxis${p + 1}`, axis = p === 0 ? "y" : `y${p + 1}`;
      const top = 1 - p * (height + gap);
      layout[key] = { domain: [Math.max(0, top - height), top], title: { text: title, font: { size: 11 } }, gridcolor: grid, zerolinecolor: "rgba(128,128,128,0.5)", nticks: 4 };
      for (const l of lines) data.push({ ...l, yaxis: axis });
      if (lines.length > 1) {
        const names = lines.map((l) => `<span style="color:${l.line.color}">${l.line.dash ? "┅" : "━"}</span> ${l.name}`).join("   ");
        layout.annotations.push({ xref: "paper", x: 1, xanchor: "right", yref: "paper", y: top, yanchor: "bottom", text: names, showarrow: false, font: { size: 11 } });
      }
      if (title === "ratio" && view.clip) for (const y of view.clip) layout.shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, yref: axis, y0: y, y1: y, line: { color: "#8a8f98", dash: "dash", width: 1 } });
    });
    layout.xaxis.anchor = panels.length === 1 ? "y" : `y${panels.length}`;
    const plot = document.getElementById("curves");
    plot.fixed = layout.shapes.slice();
    Plotly.react(plot, data, layout, { displayModeBar: false, responsive: true });
    if (!plot.dataset.bound) {
      plot.dataset.bound = "yes";
      plot.on("plotly_click", (event) => choose(event.points[0].x));
    }
  }

  function mark() {
    const plot = document.getElementById("curves");
    if (!plot.fixed) return;
    const line = { type: "line", x0: chosen, x1: chosen, yref: "paper", y0: 0, y1: 1, line: { color: "#8a8f98", width: 1 } };
    Plotly.relayout(plot, { shapes: [...plot.fixed, line] });
  }

  async function history() {
    const i = chosen;
    const plot = document.getElementById("history");
    if (!view.own[i]) return plot.replaceChildren();
    const answer = await fetch(`/api/run/${encodeURIComponent(run)}/token?kind=${encodeURIComponent(kind)}&sample=${sample}&position=${i}`);
    if (!answer.ok || i !== chosen) return;
    const reply = await answer.json();
    const color = getComputedStyle(document.body).color, grid = "rgba(128,128,128,0.18)", zero = "rgba(128,128,128,0.5)";
    const line = (name, label, c, axis) => ({ type: "scatter", mode: "lines+markers", x: reply.step, y: reply[name].map((v) => (v === null ? null : name.endsWith("logprob") ? Math.exp(v) : v)), name: label, yaxis: axis, line: { color: c, width: 1.6 }, marker: { size: 4 } });
    const data = [line("logprob", "probability", "#3b82f6", "y"), line("ref_logprob", "reference", "#8a8f98", "y")];
    if (reply.value.some((v) => v !== null)) data.push(line("value", "value", "#059669", "y2"));
    data.push(line("advantage", "advantage", "#d97706", "y2"));
    Plotly.react(plot, data, { height: 300, title: { text: "This token through training", x: 0.01, xanchor: "left", font: { size: 12 } }, margin: { l: 44, r: 8, t: 30, b: 28 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color, size: 11, family: "system-ui, sans-serif" }, legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", font: { size: 11 } }, xaxis: { title: { text: "step", standoff: 8 }, anchor: "y2", gridcolor: grid, zerolinecolor: grid, automargin: true }, yaxis: { domain: [0.55, 1], gridcolor: grid, zerolinecolor: zero, rangemode: "tozero", automargin: true }, yaxis2: { domain: [0, 0.45], gridcolor: grid, zerolinecolor: zero, automargin: true } }, { displayModeBar: false, responsive: true });
  }

  function choose(i) {
    if (i < 0 || i >= view.texts.length) return;
    chosen = i;
    detail();
  }

  place.addEventListener("click", (event) => event.target.dataset.i && choose(Number(event.target.dataset.i)));
  place.addEventListener("mouseover", (event) => { if (event.target.dataset.i && matchMedia("(hover: hover)").matches) choose(Number(event.target.dataset.i)); });
  column.addEventListener("change", paint);
  addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -chosen, End: view.texts.length - 1 - chosen };
    if (event.key in moves) choose(chosen + moves[event.key]);
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const next = column.selectedIndex + (event.key === "ArrowDown" ? 1 : -1);
      if (next >= 0 && next < column.options.length) { column.selectedIndex = next; paint(); }
    } else return;
    event.preventDefault();
  });
  addEventListener("themechange", () => { paint(); curves(); detail(); });

  const scrub = document.getElementById("scrub");
  if (scrub) {
    const steps = JSON.parse(scrub.dataset.steps);
    scrub.addEventListener("input", async () => {
      const step = steps[scrub.valueAsNumber];
      document.getElementById("scrubbed").textContent = step;
      const answer = await fetch(`/api/run/${encodeURIComponent(run)}/sample?kind=${encodeURIComponent(kind)}&step=${step}&sample=${sample}`);
      if (!answer.ok || steps[scrub.valueAsNumber] !== step) return;
      const reply = await answer.json();
      view = reply.inspector;
      document.getElementById("step").textContent = step;
      document.getElementById("glance").replaceChildren(...reply.glance.map((sentence) => Object.assign(document.createElement("li"), { textContent: sentence })));
      write(); paint(); curves(); detail();
    });
  }

  const ask = document.getElementById("ask");
  if (ask) {
    ask.addEventListener("click", async () => {
      const state = document.getElementById("asked"), place = document.getElementById("first-answer");
      ask.disabled = true;
      state.textContent = "The model is being loaded and generates …";
      const { step } = document.getElementById("first").dataset;
      const answer = await fetch(`/api/run/${encodeURIComponent(run)}/first-answer?step=${step}&sample=${sample}`, { method: "POST" });
      const reply = await answer.json().catch(() => ({ error: "The studio did not answer." }));
      state.textContent = answer.ok ? "Greedy response:" : reply.error;
      if (answer.ok) { place.textContent = reply.answer === "" ? "∅" : reply.answer; place.hidden = false; ask.hidden = true; }
      ask.disabled = false;
    });
  }

  write(); paint(); curves(); detail();
  root.dataset.ready = "yes";
})();
