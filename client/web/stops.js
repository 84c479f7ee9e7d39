// Stop texts as they are written in a field, one a line: `\n` is a line break, `\t` a tab, `\\` a backslash.

const ESCAPES = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };

/** The texts that a field says. A backslash before anything else is one. */
export function stopTexts(written) {
  const lines = written.split("\n").filter((line) => line !== "");
  return lines.map((line) => line.replace(/\\[nt\\]/g, (escape) => ESCAPES[escape]));
}

/** What a field says for these texts. */
export function stopsAsWritten(texts) {
  const written = texts.map((stop) => stop.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\t", "\\t"));
  return written.join("\n");
}
