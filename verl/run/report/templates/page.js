"use strict";
(() => {
  const form = document.querySelector(".filters");
  if (!form) return;
  const groups = [...document.querySelectorAll(".filtered .group")];
  const texts = new Map();
  for (const group of groups) {
    for (const attempt of group.querySelectorAll(".trajectory")) {
      texts.set(attempt, (group.querySelector(".question").textContent + attempt.textContent).toLowerCase());
    }
  }
  const matches = (attempt) => {
    const { text, verdict, searches } = form.elements;
    const count = Math.min(2, Number(attempt.dataset.searches));
    return (!verdict.value || attempt.dataset.verdict === verdict.value)
      && (!searches.value || count === Number(searches.value))
      && texts.get(attempt).includes(text.value.trim().toLowerCase());
  };
  const apply = () => {
    let shown = 0;
    for (const group of groups) {
      let visible = 0;
      for (const attempt of group.querySelectorAll(".trajectory")) {
        attempt.hidden = !matches(attempt);
        visible += attempt.hidden ? 0 : 1;
      }
      group.hidden = visible === 0;
      shown += visible;
    }
    form.querySelector("output").textContent = `${shown} of ${texts.size} attempts`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const button of form.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      for (const attempt of texts.keys()) {
        if (!attempt.hidden) attempt.open = button.dataset.open === "true";
      }
    });
  }
  form.hidden = false;
  apply();
})();
