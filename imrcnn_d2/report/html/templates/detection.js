// The gallery of lesions: each image with its ground truth and each model's detections.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const svg = (tag, attributes) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };

  // ---- One image: words and drawings

  const inWords = (run) => {
    const words = [];
    if (run.tp) words.push(number(run.tp, "hit", "hits"));
    if (run.fp) words.push(number(run.fp, "false alarm", "false alarms"));
    if (run.fn) words.push(number(run.fn, "missed lesion", "missed lesions"));
    if (!words.length) words.push("rightly nothing found");
    if (run.score !== null) words.push(`score ${run.score.toFixed(2)}`);
    if (run.iou !== null) words.push(`${data.overlap} ${run.iou.toFixed(0)} %`);
    return words.join(", ");
  };
  const lesions = (image) =>
    image.truth.length ? number(image.truth.length, "lesion", "lesions") : "no lesion";
  const describe = (image) =>
    `${image.name}${image.patient === null ? "" : `, patient ${image.patient}`}, ${lesions(image)}. ` +
    image.runs.map((run, i) => `${data.runs[i]}: ${inWords(run)}.`).join(" ");

  // The image with the ground truth (run undefined) or with a model's detections.
  const draw = (image, run) => {
    const { width, height } = image;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true", focusable: "false" });
    root.append(svg("image", { href: url(image), width, height }));
    const group = svg("g", { class: "contours", transform: "translate(.5 .5)" });
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
  const caption = (image, run, i) => {
    if (!run) return [element("b", {}, "Ground truth"), element("span", {}, lesions(image))];
    const values = [];
    if (run.score !== null) values.push(`score\u00a0${run.score.toFixed(2)}`);
    if (run.iou !== null) values.push(`${data.overlap}\u00a0${run.iou.toFixed(0)}`);
    return [
      element("b", {}, data.runs[i]),
      element("span", { class: "badges" }, ...badges(run)),
      element("span", {}, values.join(" · ")),
    ];
  };

  // Of the ground truth, which has no run, then of each model.
  const ofEach = (image, make) => [make(), ...image.runs.map(make)];
  const panels = (image) =>
    ofEach(image, (run, i) => element("span", { class: "panel" }, frame(image), ...caption(image, run, i)));
  const frames = (image) => ofEach(image, (run) => draw(image, run));
  const enlarged = (image) =>
    ofEach(image, (run, i) => {
      const drawing = draw(image, run);
      drawing.removeAttribute("aria-hidden");
      drawing.setAttribute("role", "img");
      const words = run ? `${data.runs[i]}: ${inWords(run)}` : `Ground truth: ${lesions(image)}`;
      drawing.setAttribute("aria-label", words);
      return element("figure", {}, drawing, element("figcaption", {}, ...caption(image, run, i)));
    });

  // ---- Filter and sort

  const outcome = (run) => [run.tp, run.fp, run.fn].join();
  const filters = {
    hits: (image) => judged(image.runs).some((run) => run.tp),
    alarms: (image) => judged(image.runs).some((run) => run.fp),
    missed: (image) => judged(image.runs).some((run) => run.fn),
    clear: (image) => !image.truth.length && judged(image.runs).some((run) => !run.fp),
    disagree: (image) => new Set(image.runs.map(outcome)).size > 1,
  };

  const errors = (image) => judged(image.runs).reduce((sum, run) => sum + run.fp + run.fn, 0);
  const score = (image) => Math.max(...judged(image.runs).map((run) => run.score ?? 0));
  const overlap = (image, undefinedIs) => {
    const known = judged(image.runs).map((run) => run.iou).filter((iou) => iou !== null);
    return known.length ? known.reduce((sum, iou) => sum + iou, 0) / known.length : undefinedIs;
  };
  const sorts = {
    worst: (a, b) => errors(b) - errors(a) || overlap(a, 100) - overlap(b, 100),
    "score-low": (a, b) => score(a) - score(b),
    "score-high": (a, b) => score(b) - score(a),
    "iou-low": (a, b) => overlap(a, 101) - overlap(b, 101),
    "iou-high": (a, b) => overlap(b, -1) - overlap(a, -1),
  };
  showGallery({ describe, panels, frames, enlarged, filters, sorts });

  // ---- Contours can be switched off

  const setContours = (on) => {
    document.body.classList.toggle("bare", !on);
    form.elements.contours.checked = on;
    dialog.querySelector("[data-do=contours]").setAttribute("aria-pressed", on);
  };
  form.elements.contours.addEventListener("change", (event) => setContours(event.target.checked));
  dialog.addEventListener("click", (event) => {
    if (event.target.dataset.do === "contours") setContours(document.body.classList.contains("bare"));
  });
})();
