// The reference's own way of a mollified trigger, with its own library, in the order of its service:
// claim the idempotency key, evaluate the trip, accept into the buffer, publish the claim.
//
//   node mollify.mjs '{"url": "redis://…", "triggers": 20000, "warmUp": 4000, "concurrency": 100,
//                      "environments": 20, "organizations": 8, "payload": "…"}'
//
// Prints one line of JSON: triggers, seconds, cpu_s (user and system, of this process), versions.
import { readFileSync } from "node:fs";
import { MollifierBuffer, serialiseSnapshot } from "@trigger.dev/redis-worker";

const wanted = JSON.parse(process.argv[2]);
const { hostname, port } = new URL(wanted.url);
const buffer = new MollifierBuffer({
  redisOptions: { host: hostname, port: Number(port), enableAutoPipelining: true },
});
const TRIP = { windowMs: 600_000, threshold: 1, holdMs: 600_000 };
const CLAIM_TTL_S = 30;
const TASK = "send-email";

async function trigger(name, number) {
  const environment = number % wanted.environments;
  const envId = `env_${environment}`;
  const orgId = `org_${environment % wanted.organizations}`;
  const runId = `run_${name}${number}`;
  const key = { envId, taskIdentifier: TASK, idempotencyKey: `${name}-${number}` };
  const token = `${name}:${number}`;

  const claim = await buffer.claimIdempotency({ ...key, token, ttlSeconds: CLAIM_TTL_S });
  if (claim.kind !== "claimed") throw new Error(`claim: ${claim.kind}`);
  await buffer.evaluateTrip(envId, TRIP);
  const payload = serialiseSnapshot({
    friendlyId: runId,
    environment: { id: envId, type: "PRODUCTION", organizationId: orgId, projectId: "proj_1" },
    taskIdentifier: TASK,
    payload: wanted.payload,
    payloadType: "application/json",
    idempotencyKey: key.idempotencyKey,
    createdAt: new Date(),
  });
  const accepted = await buffer.accept({ runId, envId, orgId, payload, ...key });
  if (accepted.kind !== "accepted") throw new Error(`accept: ${accepted.kind}`);
  const published = await buffer.publishClaim({ ...key, token, runId, ttlSeconds: CLAIM_TTL_S });
  if (!published) throw new Error("the claim was lost");
}

async function triggerAll(name, count) {
  let next = 0;
  const caller = async () => {
    while (next < count) await trigger(name, next++);
  };
  await Promise.all(Array.from({ length: wanted.concurrency }, caller));
}

await triggerAll("warm-up", wanted.warmUp);
const started = process.hrtime.bigint();
const before = process.cpuUsage();
await triggerAll("counted", wanted.triggers);
const used = process.cpuUsage(before);
const seconds = Number(process.hrtime.bigint() - started) / 1e9;
await buffer.close();

const installed = new URL("node_modules/@trigger.dev/redis-worker/package.json", import.meta.url);
console.log(
  JSON.stringify({
    triggers: wanted.triggers,
    seconds,
    cpu_s: (used.user + used.system) / 1e6,
    node: process.version,
    library: JSON.parse(readFileSync(installed, "utf8")).version,
  }),
);
