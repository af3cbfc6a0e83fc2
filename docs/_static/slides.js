// A notebook's page as slides: `?slides` behind its address. A heading begins a slide, and so does a cell with a figure; what
// does not fit goes on the next one. Arrow keys, page keys and the space bar move, Escape goes back to the page.
const asked = new URLSearchParams(location.search).has("slides");
const article = document.querySelector("article.bd-article");

if (asked) addEventListener("load", present); // scripts of the theme look for what is taken apart
else offer();

function offer() {
  const link = document.createElement("a");
  link.href = "?slides";
  link.textContent = "Show as slides";
  const line = document.createElement("p");
  line.className = "slides-offer";
  line.append(link);
  article.querySelector("h1").after(line);
}

function blocks(parent) {
  return [...parent.children].flatMap((child) => (child.matches("section") ? blocks(child) : [child]));
}

function present() {
  document.documentElement.classList.add("slides");
  const deck = document.createElement("div");
  deck.className = "slides-deck";
  const parts = blocks(article);
  article.replaceChildren(deck);
  let slide;
  let title = "";
  const full = () => slide.scrollHeight > slide.clientHeight + 1;
  const begin = (heading) => {
    slide = document.createElement("section");
    slide.className = "slide shown"; // to be measured
    deck.append(slide);
    if (heading) title = heading.textContent.replace("#", "").trim();
    const again = document.createElement("p");
    [again.className, again.textContent] = ["slide-title", title];
    slide.append(heading ?? again);
  };
  const fit = () => {
    for (let size = 90; full() && size >= 55 && !slide.querySelector("[data-lmc]"); size -= 5) slide.style.fontSize = `${size / 100}em`;
    if (full()) slide.tabIndex = 0; // one long piece of code, or an explorer: it scrolls, by keys too
  };
  for (const part of parts) {
    if (part.matches("h1, h2") || !slide) begin(part.matches("h1, h2") ? part : null);
    if (part.parentElement === slide) continue;
    const figure = part.matches(".cell") && part.querySelector(".figure-box, iframe, [data-lmc]");
    if (figure && slide.children.length > 1) begin(null);
    slide.append(part);
    if (full() && slide.children.length > 2) {
      begin(null);
      slide.append(part);
    }
    const result = part.querySelector(":scope > .cell_output");
    if (full() && part.matches(".cell") && result && part.querySelector(":scope > .cell_input")) {
      const rest = part.cloneNode(false);
      rest.append(result); // the code on one, what it gives on the next
      fit();
      begin(null);
      slide.append(rest);
    }
    fit();
  }
  const slides = [...deck.children];
  const counter = document.createElement("nav");
  counter.className = "slides-counter";
  counter.setAttribute("aria-label", "slides");
  const button = (text, label, act) => {
    const made = document.createElement("button");
    [made.type, made.textContent, made.ariaLabel] = ["button", text, label];
    made.addEventListener("click", act);
    return made;
  };
  const number = document.createElement("span");
  number.setAttribute("aria-live", "polite");
  let at = 0;
  const show = (index) => {
    at = Math.min(Math.max(index, 0), slides.length - 1);
    slides.forEach((each, i) => each.classList.toggle("shown", i === at));
    shrink(slides[at]);
    number.textContent = `${at + 1} / ${slides.length}`;
    history.replaceState(null, "", `#slide-${at + 1}`);
    window.dispatchEvent(new Event("resize"));
  };
  counter.append(
    button("‹", "slide before", () => show(at - 1)),
    number,
    button("›", "next slide", () => show(at + 1)),
    button("×", "back to the page", () => location.assign(location.pathname)),
  );
  document.body.append(counter);
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, button, [role=radio], canvas") && event.key !== "Escape") return;
    const step = { ArrowRight: 1, PageDown: 1, " ": 1, ArrowLeft: -1, PageUp: -1 }[event.key];
    const end = { Home: 0, End: slides.length }[event.key];
    if (event.key === "Escape") location.assign(location.pathname);
    else if (step || end !== undefined) {
      event.preventDefault();
      show(end ?? at + step);
    }
  });
  addEventListener("resize", (event) => event.isTrusted && shrink(slides[at]));
  show(Number(location.hash.replace("#slide-", "") || 1) - 1);
}

// An explorer that is higher than its slide is drawn smaller, by a third at most; what is left then scrolls.
function shrink(slide) {
  const explorer = slide.querySelector("[data-lmc]");
  if (!explorer) return;
  for (let size = 100; size >= 65; size -= 5) {
    explorer.style.zoom = size / 100;
    if (slide.scrollHeight <= slide.clientHeight + 1) return;
  }
}
