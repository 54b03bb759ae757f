// Receives the events of a cachebus namespace, reads a key and invalidates a tag. `python -m cachebus asyncapi` documents
// the messages. Prints one JSON object per line.
//
//   npm ci && node listener.js nats://localhost:4222 default primary user:1 users
//
// Ends when its own invalidation arrives, or after ten seconds with exit code 1.
import { connect, headers } from "@nats-io/transport-node";

const [url = "nats://localhost:4222", namespace = "default", backend = "primary", key = "user:1", tag = "users"] =
  process.argv.slice(2);

const BUDGET = 5; // Seconds to wait for a reply.
const say = (what, details) => console.log(JSON.stringify({ what, ...details }));

const connection = await connect({ servers: url, name: "node-listener" });

// Send a request and return its reply. Both are one JSON message.
async function ask(kind, fields) {
  const head = headers();
  head.set("Content-Type", "application/json");
  head.set("Cachebus-Budget", String(BUDGET));
  const subject = `cachebus.v1.${namespace}.req.backend.${backend}`;
  const body = JSON.stringify({ kind, ...fields });
  const answer = await connection.request(subject, body, { headers: head, timeout: BUDGET * 1000 });
  const reply = answer.json();
  if (reply.kind === "reply.failed") {
    throw new Error(`${reply.code}: ${reply.detail}`);
  }
  return reply;
}

// Decode a value. A payload has four bytes (version, serializer, compression, protection), then the serialized value, which
// is JSON with `payload: {serializer: json}` and no other payload setting. Integers are not payloads.
function valueOf(reply) {
  const packed = reply.value?.$base64;
  if (packed === undefined) {
    return reply.value;
  }
  const payload = Buffer.from(packed, "base64");
  if (payload.toString("latin1", 0, 4) !== "\x01j-\0") {
    throw new Error("the value is not a plain JSON payload");
  }
  return JSON.parse(payload.toString("utf8", 4));
}

// Each event is one message. Its subject contains its kind and its backend. For one origin, epoch and subject, `seq` grows
// without gaps.
const last = new Map();
const events = connection.subscribe(`cachebus.v1.${namespace}.evt.*.${backend}`);
const ownInvalidation = (async () => {
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
await connection.flush(); // From here on, no event is missed.
say("listening", { namespace, backend });

const late = setTimeout(() => {
  console.error("no invalidation arrived within ten seconds");
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

await ownInvalidation;
clearTimeout(late);
await connection.drain();
