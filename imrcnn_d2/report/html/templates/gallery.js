"use strict";
// What the galleries of all pages share: tiles that are listed at once and filled when they come near the window, filters
// and sorting, keys, and the enlarged image.
const data = JSON.parse(document.getElementById("gallery-data").textContent);
const section = document.getElementById("gallery");
const form = section.querySelector("form");
const dialog = document.querySelector("dialog");

const element = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const number = (count, one, many) => `${count} ${count === 1 ? one : many}`;
const url = (image) => {
  if (!image.url) {
    const bytes = Uint8Array.from(atob(image.jpeg), (letter) => letter.charCodeAt(0));
    image.url = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
  }
  return image.url;
};
const frame = (image) => element("span", { class: "frame", style: `aspect-ratio: ${image.width} / ${image.height}` });
// What the chosen model made of an image, else what each one did.
const judged = (results) => {
  const model = form.elements.model ? form.elements.model.value : "";
  return model === "" ? results : [results[model]];
};

// describe(image): its tile in words; panels(image): nodes in its tile, with .frame; frames(image): nodes to go into
// these frames once it is near; enlarged(image): nodes of the enlarged image; filters: {key: image => is it shown?};
// sorts: {key: comparison of two images}; isCandidate(image): may it be shown, whatever the filter?
const showGallery = ({ describe, panels, frames, enlarged, filters, sorts, isCandidate = () => true }) => {
  const PRINTED = 12; // tiles on paper; report.css hides the others
  const FILTERS = { all: () => true, ...filters };
  const SORTS = { name: (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }), ...sorts };
  const list = section.querySelector(".tiles");

  data.images.forEach((image, position) => {
    const name = element("span", { class: "name" }, image.name);
    if (image.patient !== null) name.append(element("span", {}, ` · patient ${image.patient}`));
    if (form.elements.centre && image.centre !== null) name.append(element("span", {}, ` · ${image.centre}`));
    const inside = element("span", { class: "panels" }, ...panels(image));
    image.button = element("button", { type: "button", "aria-label": describe(image) }, inside, name);
    image.tile = element("li", { "data-position": position }, image.button);
  });
  const fill = (image) => {
    if (image.filled) return;
    image.filled = true;
    const nodes = frames(image);
    image.button.querySelectorAll(".frame").forEach((place, i) => place.append(nodes[i]));
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

  let shown = [];
  // From the middle of the order outwards.
  const typicalFirst = (images) => {
    const middle = (images.length - 1) / 2;
    const distance = new Map(images.map((image, i) => [image, Math.abs(i - middle)]));
    return images.sort((a, b) => distance.get(a) - distance.get(b));
  };
  const arrange = () => {
    const centre = form.elements.centre ? form.elements.centre.value : "";
    const candidates = data.images.filter((image) => isCandidate(image) && (centre === "" || image.centre === centre));
    for (const [key, keep] of Object.entries(FILTERS)) {
      const count = form.querySelector(`[data-count=${key}]`);
      if (count) count.textContent = candidates.filter(keep).length;
    }
    const sort = form.elements.sort.value;
    shown = candidates.filter(FILTERS[form.elements.show.value]).sort(SORTS[sort] ?? SORTS.worst);
    if (sort === "typical") shown = typicalFirst(shown);
    list.replaceChildren(...shown.map((image) => image.tile));
    shown.forEach((image, i) => (image.button.tabIndex = i ? -1 : 0));
    shown.slice(0, PRINTED).forEach(fill);
    section.querySelector(".status").textContent = shown.length
      ? `${shown.length} of ${number(data.images.length, "image", "images")} shown`
      : "No image is like that.";
    const chosen = [...form.querySelectorAll("select")].filter((select) => select.value);
    const choice = [
      form.querySelector("[name=show]:checked + span").firstChild.textContent.trim(),
      ...chosen.map((select) => select.selectedOptions[0].textContent),
    ];
    section.querySelector("[data-print]").textContent =
      `Printed: the first ${Math.min(PRINTED, shown.length)} of ${shown.length} images ` +
      `(${choice.join(", ")}). The others are in the file itself.`;
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", (event) => {
    if (event.target.type !== "checkbox") arrange(); // a check box is about looks
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
    dialog.querySelector(".viewer-panels").replaceChildren(...enlarged(image));
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
  });
  dialog.addEventListener("keydown", (event) => {
    const places = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: shown.length - 1 };
    if (!(event.key in places) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    show(places[event.key]);
  });
};
