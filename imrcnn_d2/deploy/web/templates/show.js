(captions) => {
  // Figures come in the order of the captions; those of files that cannot be read have none.
  const figures = document.querySelectorAll(".cards figure.card");
  captions.filter((caption) => caption.html.trim()).forEach(({ html, shown }, i) => {
    const figure = figures[i];
    if (!figure) return;
    figure.dataset.shown = shown;
    figure.querySelector(".caption").innerHTML = html;
    for (const mark of figure.querySelectorAll("[data-mark]"))
      mark.classList.toggle("below", Number(mark.dataset.mark) >= shown);
  });
}
