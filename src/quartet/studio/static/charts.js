"use strict";
// Draws the page's charts, again where live.js has fetched the page again, and leads from a point to its rollouts.
(() => {
  const place = document.getElementById("charts");
  if (!place) return;
  const config = { displayModeBar: false, responsive: true };

  function themed(layout) {
    const color = getComputedStyle(document.body).color;
    return { ...layout, font: { ...layout.font, color }, hoverlabel: { bgcolor: window.isDark() ? "#1f2430" : "#ffffff", font: { color } } };
  }

  function box(index, chart) {
    const old = place.children[index];
    if (old) return old.firstElementChild;
    const figure = document.createElement("figure");
    const plot = document.createElement("div");
    figure.append(plot);
    if (chart.meanings.length) {
      const caption = document.createElement("figcaption");
      for (const meaning of chart.meanings) {
        const line = document.createElement("p");
        const name = document.createElement("strong");
        name.textContent = meaning.label[0].toUpperCase() + meaning.label.slice(1);
        line.append(name, meaning.text);
        caption.append(line);
      }
      const more = document.createElement("details");
      const summary = document.createElement("summary");
      summary.textContent = "What is this?";
      more.append(summary, caption);
      figure.append(more);
    }
    place.append(figure);
    return plot;
  }

  let drawn = "";
  function draw(charts) {
    const titles = JSON.stringify(charts.map((chart) => [chart.figure.layout.title.text, chart.meanings.length]));
    if (titles !== drawn) place.replaceChildren(); // another chart has come: captions stay with their own
    drawn = titles;
    charts.forEach((chart, index) => {
      const plot = box(index, chart);
      Plotly.react(plot, chart.figure.data, themed(chart.figure.layout), config);
      if (place.dataset.click && !plot.dataset.bound) {
        plot.dataset.bound = "yes";
        plot.on("plotly_click", (event) => {
          const point = event.points[0];
          const step = point.customdata ?? point.x;
          location.href = `/run/${encodeURIComponent(place.dataset.run)}/samples?step=${Math.round(step)}`;
        });
      }
    });
  }

  let charts = JSON.parse(document.getElementById("charts-data").textContent);
  draw(charts);
  addEventListener("themechange", () => draw(charts));

  addEventListener("renewed", ({ detail: page }) => {
    Object.assign(place.dataset, page.getElementById("charts").dataset); // another stage may have begun
    charts = JSON.parse(page.getElementById("charts-data").textContent);
    draw(charts);
  });
})();
