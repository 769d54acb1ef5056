// Raw RGB pictures to canvases, pixel by pixel.

const littleEndian = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1;

// One message of stages/live/messages.py: its numbers, and its pictures by name as {shape, bytes}.
export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const numbers = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const pictures = {};
  let start = 4 + length;
  for (const [name, ...shape] of numbers.pictures) {
    const size = shape.reduce((product, side) => product * side, 1);
    pictures[name] = { shape, bytes: new Uint8Array(buffer, start, size) };
    start += size;
  }
  return { numbers, pictures };
}

const kept = new WeakMap(); // of each canvas: its context, image and the image's words

// bytes: (height, width, 3), as large as the canvas
export function draw(canvas, bytes) {
  if (!kept.has(canvas)) {
    const context = canvas.getContext("2d", { alpha: false });
    const image = context.createImageData(canvas.width, canvas.height);
    kept.set(canvas, { context, image, words: new Uint32Array(image.data.buffer) });
  }
  const { context, image, words } = kept.get(canvas);
  if (littleEndian) {
    for (let i = 0, k = 0; i < words.length; i += 1, k += 3) {
      words[i] = 0xff000000 | (bytes[k + 2] << 16) | (bytes[k + 1] << 8) | bytes[k];
    }
  } else {
    for (let i = 0, k = 0; i < words.length; i += 1, k += 3) {
      words[i] = (bytes[k] << 24) | (bytes[k + 1] << 16) | (bytes[k + 2] << 8) | 0xff;
    }
  }
  context.putImageData(image, 0, 0);
}
