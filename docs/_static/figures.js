// Draw each stored figure when it comes near the window. On dark pages figures.css gives it other colours.
const NEAR = { rootMargin: "500px" };

function draw(box) {
  const { data, layout } = JSON.parse(box.querySelector("script").textContent);
  box.drawn = true;
  Plotly.newPlot(box, data, layout, { responsive: true, displaylogo: false });
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) {
      seen.unobserve(entry.target);
      draw(entry.target);
    }
  }
}, NEAR);

const boxes = [...document.querySelectorAll(".figure-box")];
boxes.forEach((box) => seen.observe(box));
window.addEventListener("beforeprint", () => boxes.forEach((box) => box.drawn || draw(box)));

// Explorers draw again when the page's theme changes: they listen to the body.
new MutationObserver(() => document.body.classList.toggle("themed")).observe(document.documentElement, { attributeFilter: ["data-theme"] });
