"use strict";
const slider = document.getElementById("age");
if (slider) {
  const panels = [...document.querySelectorAll(".panel")], told = document.getElementById("told");
  const show = () => {
    const wanted = slider.value;
    panels.forEach((panel) => { panel.hidden = panel.dataset.index !== wanted; });
    told.textContent = panels.find((panel) => !panel.hidden).dataset.people;
    document.querySelectorAll(".curve circle").forEach((dot) => dot.classList.toggle("now", dot.dataset.index === wanted));
  };
  slider.addEventListener("input", show);
  show();
}
