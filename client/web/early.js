// Before the first paint: the chosen colours and language, so that the page does not flash in others.
// A classic script, because modules run after the document is there.
(() => {
  const root = document.documentElement;
  root.lang = navigator.language.startsWith("zh") ? "zh-CN" : "en";
  try {
    const theme = localStorage.getItem("mindspore-ui/theme");
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
    const language = localStorage.getItem("mindspore-ui/language");
    if (language === "en" || language === "zh-CN") root.lang = language;
  } catch {
    // storage is forbidden: as the system has it
  }
})();
