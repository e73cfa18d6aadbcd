// Reading values off a chart; everything else works without this.
for (const chart of document.querySelectorAll(".chart[data-hover]")) {
  const svg = chart.querySelector("svg"), tip = chart.querySelector(".tip"), cursor = svg.querySelector(".cursor");
  const series = JSON.parse(chart.dataset.hover);
  const leave = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const near = series.map((s) => s.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)));
    const at = near.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    tip.replaceChildren();
    near.forEach((point, i) => {
      const line = document.createElement("div");
      line.textContent = `${series[i].name}: ${point[3]} (step ${point[2]})`;
      tip.append(line);
    });
    cursor.setAttribute("x1", at[0]);
    cursor.setAttribute("x2", at[0]);
    cursor.setAttribute("visibility", "visible");
    tip.hidden = false;
    const outer = chart.getBoundingClientRect(), left = box.left - outer.left + at[0] / scale;
    const flip = left + tip.offsetWidth + 24 > outer.width;
    tip.style.left = `${Math.max(4, flip ? left - tip.offsetWidth - 12 : left + 12)}px`;
    tip.style.top = `${box.top - outer.top + 10}px`;
  });
  svg.addEventListener("pointerleave", leave);
}
