// The gallery of classified images: each with a bar for the probability of each class, model by model.
(() => {
  const predictedClass = (scores) => scores.indexOf(Math.max(...scores));
  const percent = (share) => `${(100 * share).toFixed(0)} %`;
  const inWords = (scores, label) => {
    const predicted = predictedClass(scores);
    return `${predicted === label ? "rightly" : "wrongly"} predicted as ${data.classes[predicted]}, ${percent(scores[predicted])}`;
  };
  const describe = (image) =>
    `${image.name}, ${data.classes[image.label]}. ` +
    image.scores.map((scores, i) => `${data.runs[i]}: ${inWords(scores, image.label)}.`).join(" ");

  const photo = (image, alt) =>
    element("img", { src: url(image), alt, width: image.width, height: image.height, class: "photo" });

  // What one model says: a bar for each class.
  const verdict = (image, i) => {
    const predicted = predictedClass(image.scores[i]);
    const box = element("span", { class: "verdict" });
    const badge = predicted === image.label ? "badge" : "badge alarm-badge";
    box.append(
      element("b", {}, data.runs[i]),
      element("span", { class: badge }, predicted === image.label ? "right" : "wrong"),
    );
    image.scores[i].forEach((score, k) => {
      const kind = k === image.label ? "chance truth-chance" : "chance";
      const name = element("span", {}, data.classes[k]);
      if (k === predicted) name.append(element("span", { class: "mark" }, " ◂ predicted"));
      const bar = element("span", { class: kind, style: `--share: ${score}` }, name, element("i", {}, percent(score)));
      box.append(bar);
    });
    return box;
  };
  const verdicts = (image) => image.scores.map((_, i) => verdict(image, i));

  const panels = (image) => [
    element("span", { class: "panel" }, frame(image), element("b", {}, data.classes[image.label])),
    element("span", { class: "verdicts" }, ...verdicts(image)),
  ];
  const frames = (image) => [photo(image, "")];
  const enlarged = (image) => {
    const label = data.classes[image.label];
    return [
      element("figure", {}, photo(image, label), element("figcaption", {}, element("b", {}, label))),
      element("figure", {}, element("figcaption", { class: "verdicts" }, ...verdicts(image))),
    ];
  };

  // ---- Filter and sort

  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const ofTruth = (image) => mean(judged(image.scores).map((scores) => scores[image.label]));
  const sure = (image) => mean(judged(image.scores).map((scores) => Math.max(...scores)));
  const filters = {
    wrong: (image) => judged(image.scores).some((scores) => predictedClass(scores) !== image.label),
    right: (image) => judged(image.scores).every((scores) => predictedClass(scores) === image.label),
    disagree: (image) => new Set(image.scores.map(predictedClass)).size > 1,
  };
  const sorts = {
    worst: (a, b) => ofTruth(a) - ofTruth(b),
    best: (a, b) => ofTruth(b) - ofTruth(a),
    unsure: (a, b) => sure(a) - sure(b),
  };
  const isCandidate = (image) => form.elements.label.value === "" || image.label === Number(form.elements.label.value);
  showGallery({ describe, panels, frames, enlarged, filters, sorts, isCandidate });
})();
