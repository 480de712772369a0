"use strict";
// Draws what page.py has put into the page as JSON: curves, previews over time, samples.
const data = JSON.parse(document.getElementById("data").textContent);

function element(name, attributes = {}, parent = null, text = "") {
  const isPicture = ["svg", "g", "path", "line", "text", "circle"].includes(name);
  const made = isPicture
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function short(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  if (size !== 0 && size < 1e-3) return value.toExponential(1);
  return `${+value.toPrecision(4)}`;
}

// ---- curves

function steps(low, high, wanted, isLog) {
  const found = [];
  if (isLog) {
    const factors = Math.log10(high / low) > 3 ? [1] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const factor of factors) found.push(factor * 10 ** power);
    return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
  }
  const rough = (high - low || 1) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step)
    found.push(value);
  return found;
}

function scale(low, high, from, to, isLog) {
  const [a, b] = isLog ? [Math.log(low), Math.log(high)] : [low, high];
  return (value) => from + (((isLog ? Math.log(value) : value) - a) / (b - a || 1)) * (to - from);
}

function chart(place, { title, series, log }) {
  const [width, height, left, right, top, bottom] = [440, 230, 54, 10, 8, 22];
  const card = element("div", { class: "card" }, place);
  element("h3", {}, card, title);
  const label = `${title} over images seen; arrow keys read the values`;
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "aria-label": label }, card);
  const legend = element("div", { class: "legend" }, card);
  const where = element("span", {}, legend);
  const good = (value) => value !== null && (!log || value > 0);
  const all = series.flatMap((each) => each.y.filter(good));
  let [low, high] = [Math.min(...all), Math.max(...all)];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  if (!log && low > 0 && low < high / 2) low = 0;
  const xs = data.curves.images;
  const x = scale(Math.min(0, xs[0]), xs[xs.length - 1], left, width - right, false);
  const y = scale(low, high, height - bottom, top, log);
  let ticks = steps(low, high, 4, log);
  if (ticks.length < 2) ticks = steps(low, high, 4, false);
  for (const value of ticks) {
    element("line", { class: "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) }, svg);
    element("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, svg, short(value));
  }
  for (const value of steps(0, xs[xs.length - 1], 4, false))
    element("text", { x: Math.min(x(value), width - 22), y: height - 6, "text-anchor": "middle" }, svg, short(value));
  const values = series.map(({ name, y: ys, color, dash }) => {
    const points = ys.map((value, index) => [value, index]).filter(([value]) => good(value));
    const line = points.map(([value, index]) => `${x(xs[index]).toFixed(1)},${y(value).toFixed(1)}`);
    const style = `stroke: var(--c${color})` + (dash ? "; stroke-dasharray: 5 4" : "");
    element("path", { d: line.length ? "M" + line.join("L") : "", style }, svg);
    if (points.length < 30)
      for (const [value, index] of points)
        element("circle", { cx: x(xs[index]), cy: y(value), r: 2.2, style: `fill: var(--c${color})` }, svg);
    const entry = element("span", {}, legend);
    element("i", { style: `background: var(--c${color})` + (dash ? "; opacity: .5" : "") }, entry);
    entry.append(name + " ");
    return element("b", {}, entry);
  });
  const hair = element("line", { class: "hair", y1: top, y2: height - bottom, visibility: "hidden" }, svg);
  let at = xs.length - 1;
  function last(ys, index) {
    for (let back = index; back >= 0; back--) if (ys[back] !== null) return ys[back];
    return null;
  }
  function read(index, isShown = true) {
    at = Math.max(0, Math.min(xs.length - 1, index));
    hair.setAttribute("visibility", isShown ? "visible" : "hidden");
    hair.setAttribute("x1", x(xs[at]));
    hair.setAttribute("x2", x(xs[at]));
    where.textContent = `${xs[at].toLocaleString("en")} images`;
    series.forEach((each, number) => (values[number].textContent = short(last(each.y, at))));
  }
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const wanted = ((event.clientX - box.left) / box.width) * width;
    let best = 0;
    xs.forEach((value, index) => {
      if (Math.abs(x(value) - wanted) < Math.abs(x(xs[best]) - wanted)) best = index;
    });
    read(best);
  });
  svg.addEventListener("pointerleave", () => read(xs.length - 1, false));
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) read(at + move);
  });
  read(at, false);
}

const curves = document.getElementById("curves");
if (curves) for (const each of data.curves.charts) chart(curves, each);

// ---- previews over time

const time = document.getElementById("time");
if (time) {
  const slider = time.querySelector("input");
  const button = time.querySelector("button");
  const caption = document.getElementById("when");
  const images = { ema: document.getElementById("ema"), raw: document.getElementById("raw") };
  let playing = null;
  function show() {
    const preview = data.previews[slider.value];
    caption.textContent = preview.when;
    for (const [kind, image] of Object.entries(images)) {
      if (!image) continue;
      image.hidden = !preview[kind];
      if (preview[kind]) image.src = preview[kind];
    }
  }
  function stop() {
    clearInterval(playing);
    playing = null;
    button.textContent = "Play";
  }
  slider.addEventListener("input", () => {
    stop();
    show();
  });
  button.addEventListener("click", () => {
    if (playing) return stop();
    button.textContent = "Stop";
    if (+slider.value === data.previews.length - 1) slider.value = 0;
    playing = setInterval(() => {
      slider.value = +slider.value + 1;
      show();
      if (+slider.value === data.previews.length - 1) stop();
    }, Math.max(40, Math.min(400, 12000 / data.previews.length)));
  });
  show();
}

// ---- samples, and commands to copy

function copy(text, button) {
  const area = element("textarea", { style: "position: fixed; opacity: 0" }, document.body);
  area.value = text;
  area.select();
  const isDone = document.execCommand("copy"); // the newer way does not work from a file
  area.remove();
  button.textContent = isDone ? "Copied" : "Select it by hand";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

for (const button of document.querySelectorAll("button.copy"))
  button.addEventListener("click", () => copy(button.parentNode.querySelector("pre").textContent, button));

for (const album of data.albums) {
  const place = document.getElementById(album.id);
  const thumbs = place.querySelector(".thumbs");
  const about = place.querySelector(".about");
  const command = place.querySelector("pre");
  const buttons = album.images.map((image) => {
    const button = element("button", { type: "button", title: image.about, "aria-pressed": "false" }, thumbs);
    const options = { loading: "lazy", class: "pixels", alt: image.about, src: image.file };
    element("img", options, button);
    button.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", other === button);
      about.textContent = image.about;
      command.textContent = image.command;
    });
    return button;
  });
}
