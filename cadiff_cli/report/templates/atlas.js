"use strict";
const slider = document.getElementById("age");
if (slider) {
  const panels = [...document.querySelectorAll(".panel")], told = document.getElementById("told");
  const show = () => {
    const wanted = slider.value;
    panels.forEach((panel) => { panel.hidden = panel.dataset.index !== wanted; });
    told.textContent = panels.find((panel) => !panel.hidden).dataset.people;
    document.querySelectorAll(".curve circle, .ages button").forEach((one) => one.classList.toggle("now", one.dataset.index === wanted));
  };
  document.querySelectorAll(".ages button").forEach((button) => button.addEventListener("click", () => {
    slider.value = button.dataset.index;
    show();
  }));
  slider.addEventListener("input", show);
  show();
}
