"use strict";
// The gallery: tiles are listed at once and drawn when they come near the window.
(() => {
  const PRINTED = 12; // tiles on paper; report.css hides the others
  const data = JSON.parse(document.getElementById("gallery-data").textContent);
  const section = document.getElementById("gallery");
  const list = section.querySelector(".tiles");
  const form = section.querySelector("form");
  const dialog = document.querySelector("dialog");
  const SVG = "http://www.w3.org/2000/svg";

  const element = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const svg = (tag, attributes) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const number = (count, one, many) => `${count} ${count === 1 ? one : many}`;

  // ---- One image: words and drawings

  const inWords = (run) => {
    const said = [];
    if (run.tp) said.push(number(run.tp, "hit", "hits"));
    if (run.fp) said.push(number(run.fp, "false alarm", "false alarms"));
    if (run.fn) said.push(number(run.fn, "missed lesion", "missed lesions"));
    if (!said.length) said.push("rightly nothing found");
    if (run.score !== null) said.push(`score ${run.score.toFixed(2)}`);
    if (run.iou !== null) said.push(`${data.overlap} ${run.iou.toFixed(0)} %`);
    return said.join(", ");
  };
  const lesions = (image) =>
    image.truth.length ? number(image.truth.length, "lesion", "lesions") : "no lesion";
  const describe = (image) =>
    `${image.name}${image.patient === null ? "" : `, patient ${image.patient}`}, ${lesions(image)}. ` +
    image.runs.map((run, i) => `${data.runs[i]}: ${inWords(run)}.`).join(" ");

  const url = (image) => {
    if (!image.url) {
      const bytes = Uint8Array.from(atob(image.jpeg), (letter) => letter.charCodeAt(0));
      image.url = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
    }
    return image.url;
  };

  // The picture with the ground truth (run undefined) or with what a model made of it.
  const draw = (image, run) => {
    const { width, height } = image;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true", focusable: "false" });
    root.append(svg("image", { href: url(image), width, height }));
    const group = svg("g", { class: "outlines", transform: "translate(.5 .5)" });
    const add = (kind, d) => {
      if (!d) return;
      group.append(svg("path", { class: `halo halo-${kind}`, d }), svg("path", { class: kind, d }));
    };
    const missed = new Set(run ? run.missed : []);
    image.truth.forEach((d, i) => add(missed.has(i) ? "missed" : "truth", d));
    if (run) {
      add("alarm", run.alarms);
      add("hit", run.hits);
    }
    root.append(group);
    return root;
  };

  const badges = (run) => {
    const made = [];
    for (const [key, kind] of [["tp", "hit"], ["fp", "alarm"], ["fn", "missed"]]) {
      if (run[key]) made.push(element("span", { class: `badge ${kind}-badge` }, `${run[key]} ${key.toUpperCase()}`));
    }
    return made.length ? made : [element("span", { class: "badge" }, "TN")];
  };
  const caption = (image, i) => {
    if (i < 0) return [element("b", {}, "Ground truth"), element("span", {}, lesions(image))];
    const run = image.runs[i];
    const figures = [];
    if (run.score !== null) figures.push(`score\u00a0${run.score.toFixed(2)}`);
    if (run.iou !== null) figures.push(`${data.overlap}\u00a0${run.iou.toFixed(0)}`);
    return [
      element("b", {}, data.runs[i]),
      element("span", { class: "badges" }, ...badges(run)),
      element("span", {}, figures.join(" · ")),
    ];
  };

  const tile = (image, position) => {
    const panels = element("span", { class: "panels" });
    for (let i = -1; i < image.runs.length; i++) {
      const frame = element("span", { class: "frame", style: `aspect-ratio: ${image.width} / ${image.height}` });
      panels.append(element("span", { class: "panel" }, frame, ...caption(image, i)));
    }
    const name = element("span", { class: "name" }, image.name);
    if (image.patient !== null) name.append(element("span", {}, ` · patient ${image.patient}`));
    const button = element("button", { type: "button", "aria-label": describe(image) }, panels, name);
    image.tile = element("li", { "data-position": position }, button);
    image.button = button;
  };
  const fill = (image) => {
    if (image.drawn) return;
    image.drawn = true;
    image.button.querySelectorAll(".frame").forEach((frame, i) => frame.append(draw(image, image.runs[i - 1])));
  };

  data.images.forEach(tile);
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
    return model === "" ? image.runs : [image.runs[model]];
  };
  const outcome = (run) => [run.tp, run.fp, run.fn].join();
  const FILTERS = {
    all: () => true,
    hits: (image) => judged(image).some((run) => run.tp),
    alarms: (image) => judged(image).some((run) => run.fp),
    missed: (image) => judged(image).some((run) => run.fn),
    clear: (image) => !image.truth.length && judged(image).some((run) => !run.fp),
    disagree: (image) => new Set(image.runs.map(outcome)).size > 1,
  };

  const errors = (image) => judged(image).reduce((sum, run) => sum + run.fp + run.fn, 0);
  const score = (image) => Math.max(...judged(image).map((run) => run.score ?? 0));
  const overlap = (image, undefinedIs) => {
    const known = judged(image).map((run) => run.iou).filter((iou) => iou !== null);
    return known.length ? known.reduce((sum, iou) => sum + iou, 0) / known.length : undefinedIs;
  };
  const SORTS = {
    worst: (a, b) => errors(b) - errors(a) || overlap(a, 100) - overlap(b, 100),
    "score-low": (a, b) => score(a) - score(b),
    "score-high": (a, b) => score(b) - score(a),
    "iou-low": (a, b) => overlap(a, 101) - overlap(b, 101),
    "iou-high": (a, b) => overlap(b, -1) - overlap(a, -1),
    name: (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }),
  };

  let shown = [];
  const arrange = () => {
    for (const [key, keep] of Object.entries(FILTERS)) {
      const count = form.querySelector(`[data-count=${key}]`);
      if (count) count.textContent = data.images.filter(keep).length;
    }
    shown = data.images.filter(FILTERS[form.elements.show.value]).sort(SORTS[form.elements.sort.value]);
    list.replaceChildren(...shown.map((image) => image.tile));
    shown.forEach((image, i) => (image.button.tabIndex = i ? -1 : 0));
    shown.slice(0, PRINTED).forEach(fill);
    section.querySelector(".status").textContent = shown.length
      ? `${shown.length} of ${number(data.images.length, "image", "images")} shown`
      : "No image is like that.";
    section.querySelector("[data-print]").textContent =
      `Printed: the first ${Math.min(PRINTED, shown.length)} of ${shown.length} images ` +
      `(${form.querySelector("[name=show]:checked + span").firstChild.textContent.trim()}, ` +
      `${form.elements.sort.selectedOptions[0].textContent}). The others are in the file itself.`;
  };
  const setOutlines = (on) => {
    document.body.classList.toggle("bare", !on);
    form.elements.outlines.checked = on;
    dialog.querySelector("[data-do=outlines]").setAttribute("aria-pressed", on);
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", (event) => {
    if (event.target.name === "outlines") setOutlines(event.target.checked);
    else arrange();
  });
  arrange();

  // ---- Keys in the gallery: one tab stop, arrows within

  const focusOn = (place) => {
    const image = shown[Math.max(0, Math.min(shown.length - 1, place))];
    shown.forEach((other) => (other.button.tabIndex = other === image ? 0 : -1));
    fill(image);
    image.button.focus();
  };
  const inRow = () => {
    const top = shown[0].tile.offsetTop;
    const next = shown.findIndex((image) => image.tile.offsetTop > top);
    return next < 0 ? shown.length : next;
  };
  list.addEventListener("keydown", (event) => {
    const place = shown.findIndex((image) => image.button === event.target);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -inRow(), ArrowDown: inRow(), Home: -Infinity, End: Infinity };
    if (place < 0 || !(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    focusOn(place + steps[event.key]);
  });

  // ---- The enlarged image

  let current = 0;
  const show = (place) => {
    current = Math.max(0, Math.min(shown.length - 1, place));
    const image = shown[current];
    dialog.querySelector("#viewer-name").textContent = image.name;
    dialog.querySelector(".viewer-place").textContent =
      `${current + 1} of ${shown.length}${image.patient === null ? "" : `, patient ${image.patient}`}`;
    const panels = [];
    for (let i = -1; i < image.runs.length; i++) {
      const picture = draw(image, image.runs[i]);
      const words = i < 0 ? `Ground truth: ${lesions(image)}` : `${data.runs[i]}: ${inWords(image.runs[i])}`;
      picture.removeAttribute("aria-hidden");
      picture.setAttribute("role", "img");
      picture.setAttribute("aria-label", words);
      panels.push(element("figure", {}, picture, element("figcaption", {}, ...caption(image, i))));
    }
    dialog.querySelector(".viewer-panels").replaceChildren(...panels);
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
  dialog.addEventListener("close", () => focusOn(current));
  dialog.addEventListener("click", (event) => {
    const action = event.target.dataset.do;
    if (action === "close" || event.target === dialog) dialog.close();
    if (action === "previous") show(current - 1);
    if (action === "next") show(current + 1);
    if (action === "outlines") setOutlines(document.body.classList.contains("bare"));
  });
  dialog.addEventListener("keydown", (event) => {
    const places = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: shown.length - 1 };
    if (!(event.key in places) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    show(places[event.key]);
  });
})();
