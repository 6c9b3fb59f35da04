// The explorer without a kernel. It draws precomputed maps, needs no other file and asks no host for anything.
// The form is that of anywidget, so that JupyterLab and Voilà load the same file: the default export has
// render({ model, el }), which returns what removes the view, and model.get("data") is the payload of kdx.explorer.page.

const STYLE = `
.kdx-explorer { --line: rgb(128 128 128 / 0.5); --soft: rgb(128 128 128 / 0.1); --mark: #d1603d;
  font-size: 0.92rem; line-height: 1.35; margin: 1rem 0; }
.kdx-explorer .controls { display: flex; flex-wrap: wrap; gap: 0.5rem 0.9rem; margin: 0.5rem 0; align-items: end; }
.kdx-explorer label { display: flex; flex-direction: column; gap: 0.15rem; }
.kdx-explorer select, .kdx-explorer button { font: inherit; color: inherit; background: var(--soft);
  border: 1px solid var(--line); border-radius: 4px; padding: 0.2rem 0.4rem; max-width: 100%; min-height: 2rem; }
.kdx-explorer option { color: #111; background: #fff; }
.kdx-explorer input[type=range] { width: 11rem; max-width: 100%; accent-color: var(--mark); }
.kdx-explorer .thumbs { display: flex; flex-wrap: wrap; gap: 3px; max-height: 9.5rem; overflow-y: auto; padding: 3px; }
.kdx-explorer .thumbs canvas { width: 40px; height: 40px; image-rendering: pixelated; cursor: pointer;
  outline: 2px solid transparent; }
.kdx-explorer .thumbs [aria-selected=true] { outline-color: var(--mark); }
.kdx-explorer .main { display: grid; grid-template-columns: minmax(0, 22rem) minmax(0, 1fr); gap: 0.8rem 1.2rem; }
.kdx-explorer .picture { width: 100%; aspect-ratio: 1; image-rendering: pixelated; border: 1px solid var(--line);
  display: block; touch-action: none; cursor: crosshair; }
.kdx-explorer .names { display: flex; justify-content: space-between; gap: 1rem; font-weight: 600; }
.kdx-explorer .strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.2rem, 1fr)); gap: 0.5rem; }
.kdx-explorer .strip button { padding: 2px; background: none; text-align: center; font-size: 0.8rem; }
.kdx-explorer .strip button[aria-pressed=true] { border-color: var(--mark); box-shadow: 0 0 0 1px var(--mark); }
.kdx-explorer .strip canvas { width: 100%; aspect-ratio: 1; image-rendering: pixelated; display: block; }
.kdx-explorer table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.4rem 0; width: auto; }
.kdx-explorer td, .kdx-explorer th { padding: 0.1rem 0.7rem 0.1rem 0; text-align: left; font-weight: 400;
  white-space: nowrap; }
.kdx-explorer .bar { display: inline-block; height: 0.7em; background: var(--mark); vertical-align: baseline; }
.kdx-explorer .base .bar { background: #2b6ca3; }
.kdx-explorer .link { color: inherit; }
.kdx-explorer output { display: block; min-height: 1.4em; }
.kdx-explorer :focus-visible { outline: 3px solid #3b82f6; outline-offset: 1px; }
@media (max-width: 40rem) { .kdx-explorer .main { grid-template-columns: minmax(0, 1fr); }
  .kdx-explorer label { flex: 1 1 9rem; } .kdx-explorer select, .kdx-explorer input[type=range] { width: 100%; } }
@media print { .kdx-explorer .controls, .kdx-explorer .thumbs, .kdx-explorer .link { display: none; }
  .kdx-explorer canvas { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
`;

const OUTCOMES = {
  "all images": () => true,
  "student right, base wrong": (student, base) => student && !base,
  "base right, student wrong": (student, base) => base && !student,
  "both wrong": (student, base) => !student && !base,
  "both right": (student, base) => student && base,
};
const ENLARGED = 11; // pixels of the canvas for one of the image

function bytes(text) {
  const raw = atob(text);
  const found = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
  return found;
}

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

class Data {
  constructor(given) {
    Object.assign(this, given);
    for (const name of ["pixels", "maps", "probabilities", "colours"]) this[name] = bytes(given[name]);
    this.peaks = new Float32Array(bytes(given.peaks).buffer);
    this.networks_in_order = ["base", ...given.techniques];
    this.by_name = new Map(given.layers.map((of) => [[of.technique, of.method, of.kind].join("|"), of]));
  }

  // The map of a kind: { values (0 to 255), peak, height, width, total }; undefined where there is none.
  map(state, kind) {
    const techniques = [state.technique, ""], methods = [state.method, ""];
    const names = techniques.flatMap((technique) => methods.map((method) => [technique, method, kind].join("|")));
    const layer = names.map((name) => this.by_name.get(name)).find(Boolean);
    if (!layer) return undefined;
    const [offset, row, height, width] = layer.stages[state.stage] ?? layer.stages[""];
    const size = height * width, start = offset + state.image * size;
    const values = this.maps.subarray(start, start + size);
    const peak = this.peaks[row * this.images.length + state.image];
    return { values, peak, height, width, total: values.reduce((sum, value) => sum + value, 0) };
  }

  // Maps that are compared have one scale: Grad-CAM of both networks, and all others of a method.
  scale(state, kind) {
    const cam = kind.startsWith("Grad-CAM");
    const group = this.kinds.filter((other) => other.startsWith("Grad-CAM") === cam);
    return Math.max(...group.map((other) => this.map(state, other)?.peak ?? 0));
  }

  outcome(image, technique) {
    const { label, answers } = this.images[image];
    return [answers[technique] === label, answers.base === label];
  }

  probability(network, image, label) {
    const row = this.networks_in_order.indexOf(network) * this.images.length + image;
    return this.probabilities[row * this.classes.length + label] / 255;
  }
}

class Explorer {
  constructor(data, root) {
    this.data = data;
    this.root = root;
    this.state = {
      image: 0, technique: data.techniques[0], method: data.methods[0], stage: data.stages.at(-2) ?? data.stages[0],
      left: data.kinds[0], right: data.kinds[1], outcome: "all images", divide: 50, opacity: 55,
    };
    this.cell = null; // of the image, under the pointer or the arrow keys
    this.prefix = `kdx-${Math.random().toString(36).slice(2)}-`; // of ids; a notebook may show several explorers
    this.read();
    this.build();
    this.draw();
    this.follow = () => this.read() && this.draw();
    window.addEventListener("hashchange", this.follow);
  }

  choices() {
    const { data } = this;
    return {
      technique: data.techniques, method: data.methods, stage: data.stages, left: data.kinds, right: data.kinds,
      outcome: Object.keys(OUTCOMES),
    };
  }

  // The state from the address; what is unknown there is left as it was.
  read() {
    const given = new URLSearchParams(location.hash.slice(1));
    if (!given.has("image")) return false;
    const choices = this.choices();
    for (const [name, value] of given) {
      if (Object.hasOwn(choices, name) && choices[name].includes(value)) this.state[name] = value;
      const number = Number(value);
      const most = new Map([["image", this.data.images.length - 1], ["divide", 100], ["opacity", 100]]).get(name);
      if (most !== undefined && Number.isInteger(number) && number >= 0 && number <= most) this.state[name] = number;
    }
    if (!this.shown().includes(this.state.image)) this.state.outcome = "all images";
    return true;
  }

  address() {
    return "#" + new URLSearchParams(this.state).toString();
  }

  shown() {
    const { data, state } = this;
    const kept = OUTCOMES[state.outcome];
    return data.images.map((_, i) => i).filter((i) => kept(...data.outcome(i, state.technique)));
  }

  set(name, value) {
    this.state[name] = value;
    const shown = this.shown();
    if (!shown.length) this.state.outcome = "all images";
    else if (!shown.includes(this.state.image)) this.state.image = shown[0];
    history.replaceState(null, "", this.address());
    this.draw();
  }

  // --- the parts ------------------------------------------------------------------------------

  build() {
    const words = {
      outcome: "images", technique: "technique", method: "maps", stage: "stage", left: "left map", right: "right map",
    };
    this.selects = {};
    const label = (name, text) => {
      const options = this.choices()[name].map((value) => make("option", { value }, value));
      const select = (this.selects[name] = make("select", { "data-name": name }, ...options));
      select.addEventListener("change", () => this.set(name, select.value));
      return make("label", {}, text, select);
    };
    const labels = Object.entries(words).map(([name, text]) => label(name, text));
    this.ranges = {};
    const range = (name, text) => {
      const input = (this.ranges[name] = make("input", { type: "range", min: 0, max: 100, "data-name": name }));
      input.addEventListener("input", () => this.set(name, Number(input.value)));
      return make("label", {}, text, input);
    };
    this.thumbs = make("div", { class: "thumbs", role: "listbox", "aria-label": "images", tabindex: 0 });
    this.thumbs.addEventListener("keydown", (event) => this.turn(event));
    this.small = this.data.images.map((image, i) => this.thumbnail(image, i));
    const side = this.data.side * ENLARGED;
    this.picture = make("canvas", { class: "picture", role: "img", tabindex: 0, width: side, height: side });
    this.picture.addEventListener("pointermove", (event) => this.point(event));
    this.picture.addEventListener("pointerleave", () => this.look(null));
    this.picture.addEventListener("keydown", (event) => this.walk(event));
    this.names = make("div", { class: "names", "aria-hidden": "true" });
    this.told = make("output", { "aria-live": "polite" });
    this.answers = make("div");
    this.strip = make("div", { class: "strip" });
    this.link = make("a", { class: "link" }, "link to this view");
    const left = make("div", {}, this.names, this.picture, this.told);
    const right = make("div", {}, this.answers, make("div", {}, "left map, stage by stage"), this.strip, this.link);
    this.root.append(
      make("style", {}, STYLE),
      make("div", { class: "controls" }, ...labels.slice(0, 2)),
      this.thumbs,
      make("div", { class: "controls" }, ...labels.slice(2), range("divide", "left or right"), range("opacity", "opacity")),
      make("div", { class: "main" }, left, right),
    );
  }

  thumbnail(image, i) {
    const { side, classes } = this.data;
    const name = `image ${i}, ${classes[image.label]}`;
    const canvas = make("canvas", { role: "option", id: this.prefix + i, width: side, height: side, "aria-label": name });
    canvas.title = name;
    canvas.getContext("2d").putImageData(this.photograph(i), 0, 0);
    canvas.addEventListener("click", () => this.set("image", i));
    return canvas;
  }

  photograph(image) {
    const { side, pixels } = this.data;
    const found = new ImageData(side, side);
    for (let i = 0, from = image * side * side * 3; i < side * side; i++, from += 3)
      found.data.set([pixels[from], pixels[from + 1], pixels[from + 2], 255], 4 * i);
    return found;
  }

  // --- what was done --------------------------------------------------------------------------

  turn(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const shown = this.shown();
    const place = (shown.indexOf(this.state.image) + step + shown.length) % shown.length;
    this.set("image", shown[place]);
  }

  point(event) {
    const box = this.picture.getBoundingClientRect();
    const at = (along, size) => Math.min(this.data.side - 1, Math.max(0, Math.floor((along / size) * this.data.side)));
    this.look([at(event.clientX - box.left, box.width), at(event.clientY - box.top, box.height)]);
  }

  walk(event) {
    const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const middle = Math.floor(this.data.side / 2);
    const clip = (value) => Math.min(this.data.side - 1, Math.max(0, value));
    const [x, y] = this.cell ?? [middle, middle];
    this.look([clip(x + step[0]), clip(y + step[1])]);
    this.frame();
  }

  look(cell) {
    this.cell = cell;
    this.tell();
  }

  // --- drawing --------------------------------------------------------------------------------

  draw() {
    const { data, state } = this;
    for (const [name, select] of Object.entries(this.selects)) select.value = state[name];
    for (const [name, input] of Object.entries(this.ranges)) input.value = state[name];
    this.selects.stage.disabled = [state.left, state.right].every((kind) => this.stageless(kind));
    const shown = this.shown();
    const kept = shown.map((i) => this.small[i]);
    if (kept.length !== this.thumbs.children.length || kept.some((canvas, i) => canvas !== this.thumbs.children[i]))
      this.thumbs.replaceChildren(...kept);
    this.small.forEach((canvas, i) => canvas.setAttribute("aria-selected", String(i === state.image)));
    this.thumbs.setAttribute("aria-activedescendant", this.prefix + state.image);
    this.paint();
    this.write();
    this.stages();
    this.link.href = this.address();
    this.tell();
  }

  stageless(kind) {
    return this.state.method === this.data.fused && !kind.startsWith("Grad-CAM");
  }

  // One map over the photograph, at the size of the image, which no map exceeds.
  overlay(canvas, state, kind) {
    const { data } = this;
    const { side } = data;
    const map = data.map(state, kind);
    const scale = data.scale(state, kind);
    const opacity = map ? state.opacity / 100 : 0;
    const image = this.photograph(state.image);
    for (let y = 0, at = 0; y < side; y++)
      for (let x = 0; x < side; x++, at += 4) {
        if (!map) continue;
        const cell = (((y * map.height) / side) | 0) * map.width + (((x * map.width) / side) | 0);
        const colour = 3 * (scale > 0 ? Math.round((map.values[cell] * map.peak) / scale) : 0);
        for (let channel = 0; channel < 3; channel++)
          image.data[at + channel] =
            (1 - opacity) * image.data[at + channel] + opacity * data.colours[colour + channel];
      }
    canvas.getContext("2d", { willReadFrequently: true }).putImageData(image, 0, 0);
    return canvas;
  }

  paint() {
    const { data, state, picture } = this;
    const { width, height } = picture;
    const context = picture.getContext("2d", { willReadFrequently: true });
    const middle = Math.round((width * state.divide) / 100);
    this.scratch ??= make("canvas", { width: data.side, height: data.side });
    context.imageSmoothingEnabled = false;
    for (const [kind, from, to] of [[state.left, 0, middle], [state.right, middle, width]]) {
      context.save();
      context.beginPath();
      context.rect(from, 0, to - from, height);
      context.clip();
      context.drawImage(this.overlay(this.scratch, state, kind), 0, 0, width, height);
      context.restore();
    }
    context.fillStyle = "#fff";
    if (middle > 0 && middle < width) context.fillRect(middle - 1, 0, 2, height);
    this.names.replaceChildren(make("span", {}, state.left), make("span", {}, state.right));
  }

  frame() {
    this.paint();
    if (!this.cell) return;
    const context = this.picture.getContext("2d");
    context.strokeStyle = "#fff";
    context.lineWidth = 2;
    context.strokeRect(this.cell[0] * ENLARGED, this.cell[1] * ENLARGED, ENLARGED, ENLARGED);
  }

  stages() {
    const { data, state } = this;
    const [stages, kind] = [this.stageless(state.left) ? [""] : data.stages, state.left];
    this.strip.replaceChildren(
      ...stages.map((stage) => {
        const canvas = make("canvas", { width: data.side, height: data.side, "aria-hidden": "true" });
        this.overlay(canvas, { ...state, stage }, kind);
        const pressed = String(stage === state.stage || stage === "");
        const button = make("button", { type: "button", "aria-pressed": pressed }, canvas, stage || "all stages");
        button.addEventListener("click", () => stage && this.set("stage", stage));
        return button;
      }),
    );
  }

  write() {
    const { data, state } = this;
    const image = data.images[state.image];
    const of = (label) => [state.technique, "base"].map((network) => data.probability(network, state.image, label));
    const order = data.classes.map((_, label) => label).sort((a, b) => Math.max(...of(b)) - Math.max(...of(a)));
    const head = make("tr", {}, ...["class", "student", "base"].map((text) => make("th", { scope: "col" }, text)));
    const rows = order.slice(0, 4).map((label) => {
      const cells = of(label).map((share, i) => {
        const bar = make("span", { class: "bar", style: `width:${(1.5 * share).toFixed(2)}rem` });
        return make("td", { class: i ? "base" : "" }, bar, ` ${(100 * share).toFixed(0)} %`);
      });
      return make("tr", {}, make("th", { scope: "row" }, data.classes[label]), ...cells);
    });
    const said = (network) => data.classes[image.answers[network]];
    this.caption = `Test image ${image.row}: ${data.classes[image.label]}. Student (${state.technique}): ` +
      `${said(state.technique)}; base: ${said("base")}.`;
    this.answers.replaceChildren(make("div", {}, this.caption), make("table", {}, head, ...rows));
  }

  tell() {
    const { data, state, cell } = this;
    const describe = (kind) => {
      const map = data.map(state, kind);
      if (!map) return `${kind}: none`;
      const where = this.stageless(kind) ? "all stages" : state.stage;
      if (!cell) return `${kind} (${where}): 0 to ${map.peak.toExponential(1)}`;
      const at = (along, size) => Math.floor((along * size) / data.side);
      const value = map.values[at(cell[1], map.height) * map.width + at(cell[0], map.width)];
      const share = map.total ? (100 * value) / map.total : 0;
      return `${kind}: ${((value / 255) * map.peak).toExponential(1)}, ${share.toFixed(1)} % of the map`;
    };
    const both = [...new Set([state.left, state.right])].map(describe).join("; ");
    this.told.textContent = cell ? `column ${cell[0]}, row ${cell[1]}: ${both}` : both;
    this.picture.setAttribute("aria-label", `${this.caption} ${both}. Arrow keys read the values.`);
  }
}

export default {
  render({ model, el }) {
    el.classList.add("kdx-explorer");
    el.explorer = new Explorer(new Data(model.get("data")), el);
    return () => window.removeEventListener("hashchange", el.explorer.follow);
  },
};
