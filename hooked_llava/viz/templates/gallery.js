"use strict";
(() => {
  const images = JSON.parse(document.getElementById("images").textContent);
  const box = document.querySelector(".cards"), cards = [...box.children];
  const find = document.querySelector(".find"), output = find.querySelector("output");
  const svg = "http://www.w3.org/2000/svg";

  // An image becomes one when its card comes near the window; what is outside the region is a dark shape on top of it.
  const show = (place) => {
    const { src, width, height, squares } = images[place.dataset.number];
    const image = new Image();
    Object.assign(image, { decoding: "async", alt: "", src });
    image.classList.toggle("pixels", squares);
    const over = document.createElementNS(svg, "svg"), path = document.createElementNS(svg, "path");
    over.setAttribute("viewBox", `0 0 ${width} ${height}`);
    over.setAttribute("preserveAspectRatio", "none");
    over.setAttribute("aria-hidden", "true");
    path.setAttribute("d", place.dataset.outside);
    over.append(path);
    place.append(image, over);
  };
  const near = new IntersectionObserver((seen) => {
    for (const { isIntersecting, target } of seen) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      target.querySelectorAll(".lit").forEach(show);
    }
  }, { rootMargin: "600px" });
  cards.forEach((card) => near.observe(card));

  const value = (card, key) => (card.dataset[key] === undefined ? -Infinity : Number(card.dataset[key]));
  const update = () => {
    const words = find.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    for (const card of cards) {
      const has = words.every((word) => card.dataset.search.includes(word));
      card.hidden = !has || (find.concept.value && card.dataset.concept !== find.concept.value);
      n += !card.hidden;
    }
    output.textContent = `${n} of ${cards.length} shown`;
  };
  const sort = () => {
    const key = find.order.value, sign = key === "feature" ? 1 : -1;
    const sorted = key ? [...cards].sort((a, b) => sign * (value(a, key) - value(b, key))) : cards;
    box.append(...sorted);
  };
  find.addEventListener("input", update);
  find.addEventListener("submit", (event) => event.preventDefault());
  find.order.addEventListener("change", sort);
  update();
})();
