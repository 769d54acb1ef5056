// Live charts on canvas: the latest rows of the session's history, the dreamt ones in the dream's colour.

const SHOWN = 240; // rows
const LEFT = 38, RIGHT = 6, TOP = 6, BOTTOM = 6;

let colors;
function readColors() {
  const style = getComputedStyle(document.documentElement);
  colors = Object.fromEntries(["ink", "muted", "line", "accent", "seen", "dream", "card"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => readColors());

export class Chart {
  // line: the row's key that is drawn as a line; dots: one drawn as dots, where it is not null; range: [low, high, step] or null for what the rows have
  constructor(canvas, { line, dots = null, range = null }) {
    Object.assign(this, { canvas, line, dots, range });
    this.context = canvas.getContext("2d");
    new ResizeObserver(() => this.fit()).observe(canvas);
    this.rows = [];
  }

  fit() {
    const ratio = devicePixelRatio || 1;
    this.canvas.width = Math.round(this.canvas.clientWidth * ratio);
    this.canvas.height = Math.round(this.canvas.clientHeight * ratio);
    this.draw(this.rows);
  }

  draw(rows) {
    this.rows = rows;
    if (!colors) readColors();
    const { context, canvas } = this;
    const ratio = devicePixelRatio || 1, width = canvas.width / ratio, height = canvas.height / ratio;
    if (!width || !height) return;
    const shown = rows.slice(-SHOWN);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const [low, high, step] = this.range ?? this.limits(shown);
    const x = (i) => LEFT + ((width - LEFT - RIGHT) * (SHOWN - shown.length + i)) / (SHOWN - 1);
    const y = (value) => TOP + (height - TOP - BOTTOM) * (1 - (value - low) / (high - low));
    this.axes(low, high, step, width, y);
    this.episodes(shown, x, height);
    if (this.dots) {
      context.fillStyle = colors.accent;
      shown.forEach((row, i) => {
        if (row[this.dots] !== null) context.fillRect(x(i) - 1.25, y(row[this.dots]) - 1.25, 2.5, 2.5);
      });
    }
    context.lineWidth = 1.6;
    context.lineJoin = "round";
    for (let i = 1; i < shown.length; ) { // one path for each stretch of one colour
      const dreamt = shown[i].dreamt;
      context.strokeStyle = dreamt ? colors.dream : colors.seen;
      context.beginPath();
      context.moveTo(x(i - 1), y(shown[i - 1][this.line]));
      for (; i < shown.length && shown[i].dreamt === dreamt; i += 1) context.lineTo(x(i), y(shown[i][this.line]));
      context.stroke();
    }
  }

  limits(rows) {
    let low = 0, high = 0;
    for (const row of rows) {
      for (const key of this.dots ? [this.line, this.dots] : [this.line]) {
        if (row[key] !== null) { low = Math.min(low, row[key]); high = Math.max(high, row[key]); }
      }
    }
    const step = nice((high - low || 1) / 3);
    return [Math.floor(low / step) * step, Math.ceil(high / step) * step, step];
  }

  axes(low, high, step, width, y) {
    const { context } = this;
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.lineWidth = 1;
    for (let value = low; value <= high + step / 1e6; value += step) {
      context.strokeStyle = colors.line;
      context.beginPath();
      context.moveTo(LEFT, Math.round(y(value)) + 0.5);
      context.lineTo(width - RIGHT, Math.round(y(value)) + 0.5);
      context.stroke();
      context.fillStyle = colors.muted;
      context.fillText(String(+value.toPrecision(4)), LEFT - 6, y(value));
    }
  }

  // A dashed line where an episode begins.
  episodes(rows, x, height) {
    const { context } = this;
    context.strokeStyle = colors.muted;
    context.setLineDash([3, 3]);
    rows.forEach((row, i) => {
      if (row.decision === 0 && !row.dreamt) {
        context.beginPath();
        context.moveTo(Math.round(x(i)) + 0.5, TOP);
        context.lineTo(Math.round(x(i)) + 0.5, height - BOTTOM);
        context.stroke();
      }
    });
    context.setLineDash([]);
  }
}

// 1, 2 or 5 times a power of ten, at least the given number
function nice(number) {
  const power = 10 ** Math.floor(Math.log10(number));
  return [1, 2, 5, 10].find((factor) => factor * power >= number * (1 - 1e-9)) * power;
}
