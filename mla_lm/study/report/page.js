"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);

// Draws one chart of a figure. `data-drawn` then names the chart that is seen.
async function draw(name, choice) {
  const place = document.getElementById(name + "-chart");
  const options = { actions: false, renderer: "svg", defaultStyle: false, tooltip: { theme: "custom" } };
  try {
    await vegaEmbed(place, charts[name][choice], options);
    place.dataset.drawn = choice;
  } catch (error) {
    place.textContent = "This chart could not be drawn: " + error.message;
    throw error;
  }
}

// Sorts by a column; a second time the other way round. Cells without a value stay last.
function sort(heading) {
  const body = heading.closest("table").tBodies[0];
  const column = heading.cellIndex;
  const turned = heading.ariaSort === "ascending";
  const numbers = heading.classList.contains("right");
  const key = (row) => row.cells[column].dataset.value;
  const order = (a, b) => (numbers ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
  const rows = [...body.rows].sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === "" || b === "") return (a === "") - (b === "");
    return turned ? order(b, a) : order(a, b);
  });
  body.append(...rows);
  for (const other of heading.parentElement.cells) other.ariaSort = "none";
  heading.ariaSort = turned ? "descending" : "ascending";
}

for (const [name, choices] of Object.entries(charts)) draw(name, Object.keys(choices)[0]);
for (const input of document.querySelectorAll(".choice input"))
  input.addEventListener("change", () => draw(input.dataset.figure, input.value));
for (const button of document.querySelectorAll("thead button"))
  button.addEventListener("click", () => sort(button.parentElement));
// A printed page shows every configuration.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
