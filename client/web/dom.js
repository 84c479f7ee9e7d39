// Elements made of names, attributes and text. Text only ever becomes text: nothing here parses HTML.

/**
 * An element. Attributes that are null or false are left out; functions are event listeners (`onclick`).
 * Children are nodes, texts, nothing, or lists of them: a long answer has more than a call can have arguments.
 */
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

export const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false)
      node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}

// Lines on a grid of 24, drawn in the colour of the text around them.
const ICONS = {
  activity: "M3 12h4l3-8 4 16 3-8h4",
  auto: "M12 3a9 9 0 1 0 0 18zM12 3a9 9 0 0 1 0 18",
  check: "M5 12.5l4.5 4.5L19 7.5",
  close: "M6 6l12 12M18 6L6 18",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  dark: "M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z",
  down: "M12 5v14M6 13l6 6 6-6",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  export: "M12 4v11M7 10.5l5 5 5-5M5 20h14",
  key: "M14.5 9.5a4 4 0 1 1-1.2-2.8 4 4 0 0 1 1.2 2.8zM13.5 12l7 7M17.5 16l-2 2",
  light:
    "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v2M12 20v2M4 12H2M22 12h-2M5 5l1.4 1.4M17.6 17.6L19 19M5 19l1.4-1.4M17.6 6.4L19 5",
  menu: "M4 7h16M4 12h16M4 17h10",
  plus: "M12 5v14M5 12h14",
  retry: "M20 12a8 8 0 1 1-2.4-5.7M20 3v4.5h-4.5",
  send: "M12 19V5M6 11l6-6 6 6",
  sliders: "M4 8h9M19 8h1M4 16h2M12 16h8M16 5.5v5M9 13.5v5",
  stop: "M7 7h10v10H7z",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10.5 11v5M13.5 11v5",
};

/** One of the icons; decoration only, so what it stands for is said beside it or in a label. */
export function icon(name) {
  const path = svg("path", { d: ICONS[name] });
  return svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true", focusable: "false" }, path);
}

/** Set the icon of a button that has a label of its own. */
export function setIcon(button, name) {
  button.querySelector(".icon")?.remove();
  button.prepend(icon(name));
}

/** A button with an icon whose text is its label and its tooltip. */
export function iconButton(name, label, onclick, attributes = {}) {
  const button = element("button", { type: "button", class: "icon-button", onclick, ...attributes }, icon(name));
  setLabel(button, label);
  return button;
}

export function setLabel(button, label) {
  button.setAttribute("aria-label", label);
  button.title = label;
}

/** Say `text` to a screen reader, once. */
export function announce(text) {
  const place = byId("announcer");
  place.textContent = "";
  requestAnimationFrame(() => (place.textContent = text));
}
