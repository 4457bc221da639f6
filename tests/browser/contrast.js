// Each text that a widget shows: [its contrast with what is behind it, as WCAG computes it; the text; is it whole].
// As in WCAG, texts of controls that are disabled do not count.
() => {
  const parse = (text) => {
    const [red, green, blue, alpha = 1] = text.match(/[\d.]+/g).map(Number);
    return [red, green, blue, alpha];
  };
  const over = (top, below) => [0, 1, 2].map((k) => top[k] * top[3] + below[k] * (1 - top[3]));
  const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([red, green, blue]) => 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue);
  const opacity = (element) => (element ? getComputedStyle(element).opacity * opacity(element.parentElement) : 1);
  const ground = (element) =>
    element ? over(parse(getComputedStyle(element).backgroundColor), ground(element.parentElement)) : [255, 255, 255];
  const contrast = (element, color) => {
    const [red, green, blue, alpha] = parse(color);
    const below = ground(element);
    const ink = over([red, green, blue, alpha * opacity(element)], below);
    const [dark, bright] = [luminance(ink), luminance(below)].sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05);
  };
  const found = [];
  for (const element of document.querySelectorAll(".jp-OutputArea-output :is(.jupyter-widgets, .jupyter-widgets *)")) {
    if (!element.checkVisibility() || element.disabled || element.closest("[disabled]")) continue;
    const add = (text, part) => {
      const shown = text?.replace(/\u200b/g, "").trim();
      if (!shown) return;
      const cut = element.clientWidth && element.scrollWidth > element.clientWidth + 1;
      const whole = !cut && element.getBoundingClientRect().right <= innerWidth;
      found.push([contrast(element, getComputedStyle(element, part).color), shown, whole]);
    };
    add([...element.childNodes].map((node) => (node.nodeType === Node.TEXT_NODE ? node.textContent : "")).join(""));
    if (element.tagName === "INPUT") add(element.value);
    if (element.tagName === "SELECT") add(element.selectedOptions[0]?.text);
    if (!element.value) add(element.placeholder, "::placeholder");
  }
  return found;
}
