"use strict";
document.querySelectorAll("table.sortable").forEach((table) => {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      const value = (row) => {
        const cell = row.cells[column], text = (cell.dataset.value ?? cell.textContent).trim();
        if (head.dataset.sort === "text") return text;
        const number = parseFloat(text);
        return Number.isNaN(number) ? -Infinity : number;
      };
      const order = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a < b ? -1 : a > b ? 1 : 0);
      const rows = [...body.rows].sort((a, b) => order(value(a), value(b)) * (down ? -1 : 1));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...rows);
    };
    button.addEventListener("click", sort);
  });
});
