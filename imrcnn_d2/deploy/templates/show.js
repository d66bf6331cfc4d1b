(captions) => {
  // The server keeps nothing of a page whose connection was lost.
  document.querySelector(".cards")?.classList.toggle("forgotten", !captions.length);
  for (const { key, html, shown } of captions) {
    const figure = document.querySelector(`figure.card[data-key="${key}"]`);
    if (!figure) continue; // of a file that cannot be read, or of another drop
    figure.dataset.shown = shown;
    figure.querySelector(".caption").innerHTML = html;
    for (const mark of figure.querySelectorAll("[data-mark]"))
      mark.classList.toggle("below", Number(mark.dataset.mark) >= shown);
  }
}
