// The painter of the page: a brush over a picture, in the model's own pixels. White is repainted.
// Gradio runs this with `element`, `props` and `watch`; `props.value` is the mask as a PNG, or "".
const canvas = element.querySelector("canvas");
const brush = element.querySelector("input");
const cursor = element.querySelector(".cursor");
const pen = canvas.getContext("2d");
let at = null; // where the brush is

function toPixels(event) {
  const box = canvas.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * canvas.width;
  const y = ((event.clientY - box.top) / box.height) * canvas.height;
  return { x, y };
}

function move(to, paints) {
  if (paints) {
    pen.strokeStyle = "white";
    pen.lineCap = "round";
    pen.lineWidth = (brush.value / 100) * canvas.width;
    pen.beginPath();
    pen.moveTo(at.x, at.y);
    pen.lineTo(to.x + 0.01, to.y); // a line without a length would paint nothing
    pen.stroke();
  }
  at = to;
  cursor.style.left = `${(100 * at.x) / canvas.width}%`;
  cursor.style.top = `${(100 * at.y) / canvas.height}%`;
  cursor.style.width = `${brush.value}%`;
}

function keep() {
  props.value = canvas.toDataURL("image/png");
}

function clear() {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  props.value = "";
}

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  at = toPixels(event);
  move(at, true);
});
canvas.addEventListener("pointermove", (event) => move(toPixels(event), event.buttons && at));
canvas.addEventListener("pointerup", keep);
canvas.addEventListener("pointercancel", keep);
canvas.addEventListener("keydown", (event) => {
  const step = canvas.width / 32;
  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const [x, y] = ways[event.key] || [0, 0];
  if (!ways[event.key] && event.key !== " ") return;
  event.preventDefault(); // the page would scroll
  at = at || { x: canvas.width / 2, y: canvas.height / 2 };
  move({ x: at.x + x * step, y: at.y + y * step }, event.key === " " || event.shiftKey);
  if (event.key === " " || event.shiftKey) keep();
});
element.querySelector("button").addEventListener("click", clear);
watch("image", clear);
