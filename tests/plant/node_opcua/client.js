// node-opcua's own client, for comparison: subscribes to the load variables, or reads them, and says what it took.
"use strict";

console.log = console.warn = console.error = (...words) => process.stderr.write(`${words.join(" ")}\n`);
const opcua = require("node-opcua");

const settings = JSON.parse(process.argv[2]); // endpoint, count, publishing_ms, seconds, mode: "watch" or "read"
const PLANT_URI = "urn:opcua-detector:simulated-plant";

function cpu(since) {
    const used = process.cpuUsage(since);
    return (used.user + used.system) / 1e6;
}

async function watch(session, nodes) {
    const subscription = await session.createSubscription2({
        requestedPublishingInterval: settings.publishing_ms, requestedLifetimeCount: 6000,
        requestedMaxKeepAliveCount: 50, maxNotificationsPerPublish: 0, publishingEnabled: true,
    });
    let values = 0;
    const group = opcua.ClientMonitoredItemGroup.create(
        subscription, nodes.map((nodeId) => ({ nodeId, attributeId: opcua.AttributeIds.Value })),
        { samplingInterval: 0, queueSize: 200, discardOldest: true }, opcua.TimestampsToReturn.Both);
    group.on("changed", () => values++);
    await new Promise((resolve) => group.once("initialized", resolve));
    await new Promise((resolve) => setTimeout(resolve, settings.settle_s * 1000));
    const from = values, start = performance.now(), used = process.cpuUsage();
    await new Promise((resolve) => setTimeout(resolve, settings.seconds * 1000));
    const wall = (performance.now() - start) / 1000;
    return { values: values - from, seconds: wall, cpu_s: cpu(used) };
}

async function read(session, nodes) {
    const asked = nodes.map((nodeId) => ({ nodeId, attributeId: opcua.AttributeIds.Value }));
    for (let k = 0; k < 20; k++) {
        await session.read(asked);
    }
    const times = [], used = process.cpuUsage();
    for (let k = 0; k < settings.rounds; k++) {
        const start = performance.now();
        await session.read(asked);
        times.push((performance.now() - start) * 1000);
    }
    const cpu_s = cpu(used);
    times.sort((a, b) => a - b);
    return { reads: settings.rounds, cpu_s, p50_us: times[times.length >> 1] };
}

async function main() {
    const client = opcua.OPCUAClient.create({ endpointMustExist: false, connectionStrategy: { maxRetry: 1 } });
    await client.connect(settings.endpoint);
    const session = await client.createSession();
    const uris = (await session.read({ nodeId: "i=2255", attributeId: opcua.AttributeIds.Value })).value.value;
    const at = uris.indexOf(PLANT_URI);
    const nodes = Array.from({ length: settings.count }, (_, k) => `ns=${at};s=load.${k}`);
    const found = await (settings.mode === "read" ? read : watch)(session, nodes);
    process.stdout.write(`${JSON.stringify(found)}\n`);
    process.exit(0);
}

main().catch((error) => {
    process.stderr.write(`${error.stack ?? error}\n`);
    process.exit(1);
});
