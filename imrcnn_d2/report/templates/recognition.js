"use strict";
// The gallery of classified images: each with a bar for the probability of each class, model by model.
(() => {
  const PRINTED = 12; // tiles on paper; report.css hides the others
  const data = JSON.parse(document.getElementById("gallery-data").textContent);
  const section = document.getElementById("gallery");
  const list = section.querySelector(".tiles");
  const form = section.querySelector("form");
  const dialog = document.querySelector("dialog");

  const element = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const calledBy = (scores) => scores.indexOf(Math.max(...scores));
  const percent = (share) => `${(100 * share).toFixed(0)} %`;
  const inWords = (scores, label) => {
    const called = calledBy(scores);
    return `${called === label ? "rightly" : "wrongly"} called ${data.classes[called]}, ${percent(scores[called])}`;
  };
  const describe = (image) =>
    `${image.name}, ${data.classes[image.label]}. ` +
    image.scores.map((scores, i) => `${data.runs[i]}: ${inWords(scores, image.label)}.`).join(" ");

  const url = (image) => {
    if (!image.url) {
      const bytes = Uint8Array.from(atob(image.jpeg), (letter) => letter.charCodeAt(0));
      image.url = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
    }
    return image.url;
  };
  const photo = (image, alt) =>
    element("img", { src: url(image), alt, width: image.width, height: image.height, class: "photo" });

  // What one model says: a bar for each class.
  const verdict = (image, i) => {
    const called = calledBy(image.scores[i]);
    const box = element("span", { class: "verdict" });
    const badge = called === image.label ? "badge" : "badge alarm-badge";
    box.append(
      element("b", {}, data.runs[i]),
      element("span", { class: badge }, called === image.label ? "right" : "wrong"),
    );
    image.scores[i].forEach((score, k) => {
      const kind = k === image.label ? "chance truth-chance" : "chance";
      const name = element("span", {}, data.classes[k]);
      if (k === called) name.append(element("span", { class: "mark" }, " ◂ called"));
      const bar = element("span", { class: kind, style: `--share: ${score}` }, name, element("i", {}, percent(score)));
      box.append(bar);
    });
    return box;
  };

  data.images.forEach((image, position) => {
    const frame = element("span", { class: "frame", style: `aspect-ratio: ${image.width} / ${image.height}` });
    const words = element("span", { class: "verdicts" });
    image.scores.forEach((_, i) => words.append(verdict(image, i)));
    const left = element("span", { class: "panel" }, frame, element("b", {}, data.classes[image.label]));
    const panels = element("span", { class: "panels" }, left, words);
    const name = element("span", { class: "name" }, image.name);
    if (image.patient !== null) name.append(element("span", {}, ` · patient ${image.patient}`));
    image.button = element("button", { type: "button", "aria-label": describe(image) }, panels, name);
    image.tile = element("li", { "data-position": position }, image.button);
  });
  const fill = (image) => {
    if (image.drawn) return;
    image.drawn = true;
    image.button.querySelector(".frame").append(photo(image, ""));
  };
  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        near.unobserve(entry.target);
        fill(data.images[entry.target.dataset.position]);
      }
    },
    { rootMargin: "600px" },
  );
  data.images.forEach((image) => near.observe(image.tile));

  // ---- Filter and sort

  const judged = (image) => {
    const model = form.elements.model ? form.elements.model.value : "";
    return model === "" ? image.scores : [image.scores[model]];
  };
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const ofTruth = (image) => mean(judged(image).map((scores) => scores[image.label]));
  const sure = (image) => mean(judged(image).map((scores) => Math.max(...scores)));
  const ofClass = (image) => form.elements.label.value === "" || image.label === Number(form.elements.label.value);
  const FILTERS = {
    all: () => true,
    wrong: (image) => judged(image).some((scores) => calledBy(scores) !== image.label),
    right: (image) => judged(image).every((scores) => calledBy(scores) === image.label),
    disagree: (image) => new Set(image.scores.map(calledBy)).size > 1,
  };
  const SORTS = {
    worst: (a, b) => ofTruth(a) - ofTruth(b),
    best: (a, b) => ofTruth(b) - ofTruth(a),
    unsure: (a, b) => sure(a) - sure(b),
    name: (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }),
  };
  let shown = [];
  const arrange = () => {
    const those = data.images.filter(ofClass);
    for (const [key, keep] of Object.entries(FILTERS)) {
      const count = form.querySelector(`[data-count=${key}]`);
      if (count) count.textContent = those.filter(keep).length;
    }
    shown = those.filter(FILTERS[form.elements.show.value]).sort(SORTS[form.elements.sort.value]);
    list.replaceChildren(...shown.map((image) => image.tile));
    shown.slice(0, PRINTED).forEach(fill);
    const images = data.images.length === 1 ? "image" : "images";
    section.querySelector(".status").textContent = shown.length
      ? `${shown.length} of ${data.images.length} ${images} shown`
      : "No image is like that.";
    section.querySelector("[data-print]").textContent =
      `Printed: the first ${Math.min(PRINTED, shown.length)} of ${shown.length} images. The others are in the file itself.`;
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", arrange);
  arrange();

  // ---- The enlarged image

  let current = 0;
  const show = (place) => {
    current = Math.max(0, Math.min(shown.length - 1, place));
    const image = shown[current];
    dialog.querySelector("#viewer-name").textContent = image.name;
    dialog.querySelector(".viewer-place").textContent =
      `${current + 1} of ${shown.length}${image.patient === null ? "" : `, patient ${image.patient}`}`;
    const label = data.classes[image.label];
    const words = element("figure", {}, element("figcaption", { class: "verdicts" }));
    image.scores.forEach((_, i) => words.firstChild.append(verdict(image, i)));
    const picture = element("figure", {}, photo(image, label), element("figcaption", {}, element("b", {}, label)));
    dialog.querySelector(".viewer-panels").replaceChildren(picture, words);
    // Not "disabled", which would lose the focus of a button that is held down.
    dialog.querySelector("[data-do=previous]").setAttribute("aria-disabled", current === 0);
    dialog.querySelector("[data-do=next]").setAttribute("aria-disabled", current === shown.length - 1);
  };
  list.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    show(shown.findIndex((image) => image.button === button));
    dialog.showModal();
  });
  dialog.addEventListener("close", () => shown[current].button.focus());
  dialog.addEventListener("click", (event) => {
    const action = event.target.dataset.do;
    if (action === "close" || event.target === dialog) dialog.close();
    if (action === "previous") show(current - 1);
    if (action === "next") show(current + 1);
  });
  dialog.addEventListener("keydown", (event) => {
    const places = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: shown.length - 1 };
    if (!(event.key in places) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    show(places[event.key]);
  });
})();
