"use strict";
// The plot of a chart within its drawing; the same numbers are in pst_ds/report/charts.py.
const WIDTH = 360, LEFT = 54, RIGHT = 350;

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const digits = (value) => String(Number(value.toPrecision(4)));
const dataOf = (figure) => JSON.parse(figure.querySelector("script").textContent);

/** Calls place(x) in units of the drawing while the pointer is on it, move(dx) for arrow keys, and leave(). */
function follow(plot, place, move, leave) {
  const at = (event) => {
    const box = plot.getBoundingClientRect();
    place((event.clientX - box.left) / box.width * WIDTH);
  };
  plot.addEventListener("pointermove", at);
  plot.addEventListener("pointerdown", at);
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    move(step);
  });
}

/** Index of the number in the sorted list that is nearest to the wanted one. */
function nearest(sorted, wanted) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle + 1; else high = middle;
  }
  return low > 0 && wanted - sorted[low - 1] < sorted[low] - wanted ? low - 1 : low;
}

/** The legend of a chart says the values at the pointer. */
function readChart(figure) {
  const { low, high, series } = dataOf(figure);
  const rule = figure.querySelector(".pointer"), output = figure.querySelector("output");
  const values = [...figure.querySelectorAll(".legend b")];
  const atRest = [output, ...values].map((element) => [element, element.textContent]);
  const steps = [...new Set(series.flatMap((line) => line.x))].sort((a, b) => a - b);
  let current = steps.length - 1;
  const show = (index) => {
    current = clamp(index, 0, steps.length - 1);
    const step = steps[current], x = LEFT + (step - low) / (high - low) * (RIGHT - LEFT);
    rule.setAttribute("x1", x);
    rule.setAttribute("x2", x);
    output.textContent = `step ${step.toLocaleString("en")}`;
    series.forEach((line, i) => {
      const isThere = step >= line.x[0] && step <= line.x.at(-1);
      values[i].textContent = isThere ? digits(line.y[nearest(line.x, step)]) : "–";
    });
  };
  const leave = () => {
    rule.setAttribute("x1", -9);
    rule.setAttribute("x2", -9);
    atRest.forEach(([element, text]) => { element.textContent = text; });
  };
  const place = (x) => show(nearest(steps, low + (x - LEFT) / (RIGHT - LEFT) * (high - low)));
  follow(figure.querySelector(".plot"), place, (dx) => show(current + dx), leave);
}

/** Sorts a table by the column of a button; missing values are last either way. */
function sortBy(table, heading) {
  const column = [...heading.parentNode.children].indexOf(heading), body = table.tBodies[0];
  const isNumber = body.querySelector(`tr > :nth-child(${column + 1})[data-value]`) !== null;
  const wasSorted = heading.getAttribute("aria-sort");
  const isDescending = wasSorted ? wasSorted === "ascending" : isNumber; // the greatest number first
  const key = (row) => {
    const cell = row.children[column];
    return isNumber ? Number(cell.dataset.value ?? NaN) : cell.textContent;
  };
  const compare = (a, b) => {
    if (!isNumber) return a.localeCompare(b, "en", { numeric: true });
    return Number.isNaN(a) || Number.isNaN(b) ? 0 : a - b;
  };
  const rows = [...body.rows].map((row) => ({ row, key: key(row) }));
  rows.sort((a, b) => Number.isNaN(a.key) - Number.isNaN(b.key) || compare(a.key, b.key) * (isDescending ? -1 : 1));
  body.append(...rows.map(({ row }) => row));
  table.querySelectorAll("[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
}

document.querySelectorAll("figure.chart").forEach(readChart);
document.querySelectorAll("table.sortable").forEach((table) => {
  table.querySelectorAll("th button").forEach((button) => {
    button.addEventListener("click", () => sortBy(table, button.closest("th")));
  });
});
