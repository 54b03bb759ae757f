// Listens to the events of a cachebus namespace, reads a key and invalidates tags; the messages are those of
// `python -m cachebus asyncapi`. Prints one JSON object a line.
//
//   npm ci && node listener.js nats://localhost:4222 default primary user:1 users
//
// It ends when it has heard of its own invalidation, or after ten seconds with exit code 1.
import { connect, headers } from "@nats-io/transport-node";

const [url = "nats://localhost:4222", namespace = "default", backend = "primary", key = "user:1", tag = "users"] =
  process.argv.slice(2);

const BUDGET = 5; // Seconds that an answer may take.
const say = (what, details) => console.log(JSON.stringify({ what, ...details }));

const connection = await connect({ servers: url, name: "node-listener" });

// A request is one message as JSON; the answer is one too.
async function ask(kind, fields) {
  const told = headers();
  told.set("Content-Type", "application/json");
  told.set("Cachebus-Budget", String(BUDGET));
  const subject = `cachebus.v1.${namespace}.req.backend.${backend}`;
  const body = JSON.stringify({ kind, ...fields });
  const answer = await connection.request(subject, body, { headers: told, timeout: BUDGET * 1000 });
  const reply = answer.json();
  if (reply.kind === "reply.failed") {
    throw new Error(`${reply.code}: ${reply.detail}`);
  }
  return reply;
}

// A value is a payload: four bytes (version, serializer, compression, protection) and then what the serializer wrote. With
// `payload: {serializer: json}` and nothing else that is JSON. Integers are no payloads.
function valueOf(reply) {
  const packed = reply.value?.$base64;
  if (packed === undefined) {
    return reply.value;
  }
  const payload = Buffer.from(packed, "base64");
  if (payload.toString("latin1", 0, 4) !== "\x01j-\0") {
    throw new Error("the value is no plain JSON payload");
  }
  return JSON.parse(payload.toString("utf8", 4));
}

// Every event is one message on a subject that names its kind and its backend. `seq` counts without a gap what one
// origin, in one epoch, told on one subject.
const last = new Map();
const events = connection.subscribe(`cachebus.v1.${namespace}.evt.*.${backend}`);
const heardOfInvalidation = (async () => {
  for await (const message of events) {
    const event = message.json();
    const numbering = `${event.origin} ${event.epoch} ${message.subject}`;
    const missed = last.has(numbering) ? event.seq - last.get(numbering) - 1 : 0;
    last.set(numbering, event.seq);
    say("event", { kind: event.kind, key: event.key, tags: event.tags, seq: event.seq, missed });
    if (event.kind === "event.tags_invalidated" && event.tags.includes(tag)) {
      return;
    }
  }
})();
await connection.flush(); // From here on nothing is missed.
say("listening", { namespace, backend });

const late = setTimeout(() => {
  console.error("nothing was heard for ten seconds");
  process.exit(1);
}, 10_000);

const before = await ask("backend.get", { key });
say("reply", { kind: before.kind, value: valueOf(before), tags: before.tags });
const done = await ask("backend.invalidate_tags", { tags: [tag] });
say("reply", { kind: done.kind });
const after = await ask("backend.get", { key });
say("reply", { kind: after.kind });
try {
  await ask("backend.get", { key: 7 });
} catch (error) {
  say("refused", { why: error.message });
}

await heardOfInvalidation;
clearTimeout(late);
await connection.drain();
