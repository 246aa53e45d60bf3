"use strict";
// A slider shows the truth to its left and the prediction to its right; the keyboard moves the range below it.
for (const part of document.querySelectorAll(".compare")) {
  const stack = part.querySelector(".stack"), range = part.querySelector("input");
  const show = () => {
    stack.style.setProperty("--cut", range.value + "%");
    range.setAttribute("aria-valuetext", `${range.value} % truth, ${100 - range.value} % prediction`);
  };
  const follow = (event) => {
    const box = stack.getBoundingClientRect();
    range.value = Math.round(100 * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
    show();
  };
  range.addEventListener("input", show);
  stack.addEventListener("pointerdown", (event) => { stack.setPointerCapture(event.pointerId); follow(event); });
  stack.addEventListener("pointermove", (event) => { if (event.buttons) follow(event); });
  show();
}
// A column's heading sorts its table, a second time the other way; cells without a figure stay last.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement, table = heading.closest("table"), body = table.tBodies[0];
    const index = heading.cellIndex, up = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => {
      const cell = row.cells[index];
      return cell.dataset.v === undefined ? cell.textContent.trim() : Number(cell.dataset.v);
    };
    const missing = (value) => value === "-" || value === "";
    const compare = (a, b) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return up ? order : -order;
    };
    for (const row of [...body.rows].sort((a, b) => compare(key(a), key(b)))) body.append(row);
  });
}
// On a narrow page the contents are closed until somebody opens them.
if (matchMedia("(max-width: 1099px)").matches) document.querySelector("nav details").open = false;
