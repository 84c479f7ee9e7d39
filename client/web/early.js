// Before the first paint: the chosen colours and language, so that the page does not flash in others.
// A classic script, because modules run after the document is there.
(() => {
  const root = document.documentElement;
  const theme = localStorage.getItem("mindspore-ui/theme");
  const language = localStorage.getItem("mindspore-ui/language");
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  root.lang = (language ?? navigator.language).startsWith("zh") ? "zh-CN" : "en";
})();
