// Reads an AsyncAPI document from standard input, and prints what the AsyncAPI project's own parser says of it, as JSON.
const path = require("node:path");
const { createRequire } = require("node:module");

// The packages lie in a cache folder, which the first argument names.
const load = createRequire(path.join(process.argv[2], "package.json"));
const { Parser } = load("@asyncapi/parser");

let text = "";
process.stdin.on("data", (part) => (text += part));
process.stdin.on("end", async () => {
  const { document, diagnostics } = await new Parser().parse(text);
  console.log(
    JSON.stringify({
      version: document ? document.version() : null,
      channels: document ? document.channels().length : 0,
      operations: document ? document.operations().length : 0,
      messages: document ? document.allMessages().length : 0,
      diagnostics: diagnostics.map(({ code, severity, message, path }) => ({ code, severity, message, path })),
    }),
  );
});
