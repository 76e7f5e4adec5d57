// Light or dark as the system has it, or as somebody chose.

import { html, useState } from "./vendor/htm-preact.js";

const KEY = "wonderq.theme";
const THEMES = ["auto", "light", "dark"];

function kept() {
  try {
    const theme = localStorage.getItem(KEY);
    return THEMES.includes(theme) ? theme : "auto";
  } catch {
    return "auto";
  }
}

/** Show the page in the theme that was chosen. */
export function applyTheme(theme = kept()) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

export function ThemeButton() {
  const [theme, setTheme] = useState(kept());
  const turn = () => {
    const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    try {
      localStorage.setItem(KEY, next);
    } catch {
      // Then it is so for this page.
    }
    applyTheme(next);
    setTheme(next);
  };
  return html`<button type="button" class="theme" onClick=${turn} title="Light, dark, or as the system has it">
    <span class="unseen">Theme: </span>${{ auto: "Auto", light: "Light", dark: "Dark" }[theme]}
  </button>`;
}
