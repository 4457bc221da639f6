// JupyterLab saves a cell's widget without its state. Opened again after its kernel has ended, the notebook would show
// "Error displaying widget". So each save adds states to the notebook's metadata, as JupyterLab does on request: of our
// widgets a picture of what they show, of other widgets (progress bars) their own state, of closed ones nothing.
const VIEW = "application/vnd.jupyter.widget-view+json";
const STATE = "application/vnd.jupyter.widget-state+json";
const NOTHING = "R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"; // one transparent pixel
const watched = new WeakSet(); // notebooks

function initialize({ model }) {
  const manager = model.widget_manager;
  const context = manager.context; // JupyterLab's, of the notebook; other programs have none
  if (!context?.saveState || watched.has(context)) return;
  watched.add(context);
  context.saveState.connect((_, phase) => phase === "started" && keepStates(manager, context.model));
}

function keepStates(manager, notebook) {
  const before = notebook.getMetadata("widgets")?.[STATE]?.state ?? {};
  const known = { ...before, ...manager.get_state_sync({ drop_defaults: true }).state };
  const kept = {};
  const keep = (id) => {
    if (!known[id] || kept[id]) return;
    kept[id] = known[id];
    for (const [, part] of JSON.stringify(known[id].state).matchAll(/IPY_MODEL_(\w+)/g)) keep(part);
  };
  for (const cell of notebook.toJSON().cells)
    for (const { data } of cell.outputs ?? []) {
      if (!data?.[VIEW]) continue;
      const id = data[VIEW].model_id;
      const panel = document.querySelector(`.attnlab-${id}`);
      if (panel) known[id] = picture(shot(panel) ?? data["image/png"]);
      else if (data["image/png"]) known[id] = before[id] ?? picture(data["image/png"]);
      known[id] ??= picture(NOTHING);
      keep(id);
    }
  if (Object.keys({ ...before, ...kept }).length)
    notebook.setMetadata("widgets", { [STATE]: { version_major: 2, version_minor: 0, state: kept } });
}

function picture(png) {
  const buffers = [{ path: ["value"], encoding: "base64", data: png }];
  const model = { model_module: "@jupyter-widgets/controls", model_module_version: "2.0.0", model_name: "ImageModel" };
  return { ...model, state: {}, buffers };
}

// The pictures that a widget shows, where they are: a PNG as base64, or undefined if it shows none.
function shot(panel) {
  const shown = [...panel.querySelectorAll("canvas, img")].filter((one) => one.offsetParent && one.width);
  if (!shown.length) return undefined;
  const boxes = shown.map((one) => one.getBoundingClientRect());
  const left = Math.min(...boxes.map((box) => box.left));
  const top = Math.min(...boxes.map((box) => box.top));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(...boxes.map((box) => box.right)) - left;
  canvas.height = Math.max(...boxes.map((box) => box.bottom)) - top;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  shown.forEach((one, k) => {
    const box = boxes[k];
    context.drawImage(one, box.left - left, box.top - top, box.width, box.height);
  });
  return canvas.toDataURL().split(",")[1];
}

export default { initialize };
