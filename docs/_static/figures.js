// Draw each stored figure when it comes near the window, in the page's colours, and again when these change.
const NEAR = { rootMargin: "500px" };

function coloured(layout) {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--pst-color-text-base");
  const line = style.getPropertyValue("--pst-color-border");
  const dark = document.documentElement.dataset.theme === "dark";
  const clear = "rgba(0,0,0,0)";
  const found = { ...layout, paper_bgcolor: clear, font: { ...layout.font, color: ink } };
  if (!dark) return found;
  found.plot_bgcolor = clear;
  for (const key of Object.keys(layout).concat(["xaxis", "yaxis"])) {
    if (/^[xy]axis\d*$/.test(key)) found[key] = { ...layout[key], gridcolor: line, linecolor: ink, tickcolor: ink };
  }
  return found;
}

function draw(box) {
  const { data, layout } = JSON.parse(box.querySelector("script").textContent);
  box.given = layout;
  Plotly.newPlot(box, data, coloured(layout), { responsive: true, displaylogo: false });
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
const again = () => boxes.forEach((box) => box.given && Plotly.relayout(box, coloured(box.given)));
new MutationObserver(again).observe(document.documentElement, { attributeFilter: ["data-theme"] });
window.addEventListener("beforeprint", () => boxes.forEach((box) => box.given || draw(box)));
