// A picture on a canvas: its pixels are sent as PNG, pointing and painting come back as rows and columns.
// Strokes are drawn here at once and sent when they end, so that painting never waits for the kernel.

function render({ model, el }) {
  const canvas = document.createElement("canvas");
  canvas.className = "attnlab-picture";
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  el.append(canvas);
  const context = canvas.getContext("2d");
  const picture = new Image();
  let mask = null; // Uint8Array (row, column) while painting
  let stroke = false;

  const size = () => model.get("size"); // rows, columns
  const side = () => Math.max(1, Math.floor(model.get("width") / size()[1])); // screen pixels of a pixel

  function draw() {
    const [rows, columns] = size();
    canvas.width = columns * side();
    canvas.height = rows * side();
    canvas.setAttribute("aria-label", model.get("label"));
    context.imageSmoothingEnabled = false;
    if (picture.complete && picture.naturalWidth) context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    if (mask) paintMask(rows, columns);
    const point = model.get("point");
    if (point.length) mark(...point);
    canvas.dataset.shown = model.get("number");
  }

  function paintMask(rows, columns) {
    context.fillStyle = "rgba(255, 31, 209, 0.5)";
    for (let row = 0; row < rows; row++)
      for (let column = 0; column < columns; column++)
        if (mask[row * columns + column]) context.fillRect(column * side(), row * side(), side(), side());
  }

  function mark(row, column) {
    for (const [color, line] of [["black", 3], ["white", 1.5]]) {
      context.strokeStyle = color;
      context.lineWidth = line;
      context.strokeRect(column * side() - 1, row * side() - 1, side() + 2, side() + 2);
    }
  }

  function load() {
    const url = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
    picture.onload = () => {
      URL.revokeObjectURL(url);
      draw();
    };
    picture.src = url;
  }

  function takeMask() {
    const bytes = model.get("mask");
    mask = bytes.byteLength ? new Uint8Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength)) : null;
    draw();
  }

  function at(event) {
    const [rows, columns] = size();
    const box = canvas.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    return [Math.min(Math.max(row, 0), rows - 1), Math.min(Math.max(column, 0), columns - 1)];
  }

  function dab(row, column) {
    const [rows, columns] = size();
    const brush = model.get("brush");
    const radius = Math.abs(brush);
    mask ??= new Uint8Array(rows * columns);
    for (let r = Math.max(0, row - radius); r <= Math.min(rows - 1, row + radius); r++)
      for (let c = Math.max(0, column - radius); c <= Math.min(columns - 1, column + radius); c++)
        if ((r - row) ** 2 + (c - column) ** 2 < radius ** 2) mask[r * columns + c] = brush > 0 ? 1 : 0;
    draw();
  }

  function send() {
    model.set("mask", new DataView(mask.slice().buffer));
    model.save_changes();
  }

  function point(where) {
    model.set("point", where);
    model.save_changes();
    draw();
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (!model.get("brush")) return point(at(event));
    stroke = true;
    canvas.setPointerCapture(event.pointerId);
    dab(...at(event));
  });
  canvas.addEventListener("pointermove", (event) => stroke && dab(...at(event)));
  canvas.addEventListener("pointerup", () => {
    if (stroke) send();
    stroke = false;
  });
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const [rows, columns] = size();
    const now = model.get("point").length ? model.get("point") : [rows >> 1, columns >> 1];
    if (event.key in moves) {
      const [down, right] = moves[event.key];
      point([Math.min(Math.max(now[0] + down, 0), rows - 1), Math.min(Math.max(now[1] + right, 0), columns - 1)]);
    } else if (event.key === " " && model.get("brush")) {
      dab(...now);
      send();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  model.on("change:number", load);
  model.on("change:mask", takeMask);
  model.on("change:point change:width change:size", draw);
  takeMask();
  load();
}

export default { render };
