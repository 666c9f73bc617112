// Hover, touch or arrow keys on one chart: every chart shows its values at that step.
const charts = [...document.querySelectorAll("figure.chart[id]")].map((figure) => {
  const data = JSON.parse(document.getElementById(figure.id + "-data").textContent);
  const area = figure.querySelector(".area"), cursor = figure.querySelector(".cursor");
  const dots = data.curves.map((curve) => {
    const dot = document.createElement("div");
    dot.className = "dot c" + curve.colour;
    dot.hidden = true;
    return area.appendChild(dot);
  });
  const values = [...figure.querySelectorAll(".legend b")];
  return { data, area, cursor, dots, values, last: values.map((v) => v.textContent), where: figure.querySelector(".where") };
});
const nearest = (xs, x) => {
  let low = 0, high = xs.length - 1;
  while (low < high) { const mid = (low + high) >> 1; xs[mid] < x ? (low = mid + 1) : (high = mid); }
  return low > 0 && x - xs[low - 1] <= xs[low] - x ? low - 1 : low;
};
const percent = (chart, x) => (100 * (x - chart.data.x[0])) / (chart.data.x[1] - chart.data.x[0]);
let steps = [], current = 0;
for (const chart of charts) for (const curve of chart.data.curves) if (curve.x.length > steps.length) steps = curve.x;
const show = (step) => {
  for (const chart of charts) {
    const left = percent(chart, step);
    chart.cursor.hidden = left < 0 || left > 100;
    chart.cursor.style.left = left + "%";
    chart.where.textContent = "· step " + step.toLocaleString("en");
    chart.data.curves.forEach((curve, k) => {
      const i = nearest(curve.x, step), top = curve.top[i];
      chart.values[k].textContent = curve.text[i] + (curve.x[i] === step ? "" : " @" + curve.x[i].toLocaleString("en"));
      chart.dots[k].hidden = top === null || chart.cursor.hidden;
      chart.dots[k].style.left = percent(chart, curve.x[i]) + "%";
      chart.dots[k].style.top = top + "%";
    });
  }
};
const hide = () => {
  for (const chart of charts) {
    chart.cursor.hidden = true;
    chart.where.textContent = "";
    chart.values.forEach((value, k) => (value.textContent = chart.last[k]));
    chart.dots.forEach((dot) => (dot.hidden = true));
  }
};
for (const chart of charts) {
  const point = (event) => {
    const box = chart.area.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    current = nearest(steps, chart.data.x[0] + share * (chart.data.x[1] - chart.data.x[0]));
    show(steps[current]);
  };
  chart.area.addEventListener("pointermove", point);
  chart.area.addEventListener("pointerdown", point);
  chart.area.addEventListener("pointerleave", hide);
  chart.area.addEventListener("blur", hide);
  chart.area.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    current = Math.min(steps.length - 1, Math.max(0, current + move));
    show(steps[current]);
  });
}
