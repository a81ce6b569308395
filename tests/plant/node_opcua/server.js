// A node-opcua server with bad habits, worked by the tests over stdin and stdout, one JSON object per line.
//
// It carries the tags of the simulated plant (rows played from a file of float64, so that the values are those of
// the process the models were fitted on), the result nodes of the product's own NodeSet, and load variables that
// count. It listens on loopback only and ends when stdin closes, so it cannot outlive the test that started it.
"use strict";

const fs = require("node:fs");
const path = require("node:path");
const readline = require("node:readline");

// The clock of the whole server, libraries too, may jump: what asks for the time of day gets it with this offset.
const TrueDate = Date;
let clockOffsetMs = 0;
globalThis.Date = new Proxy(TrueDate, {
    construct: (target, given) => (given.length ? new target(...given) : new target(TrueDate.now() + clockOffsetMs)),
    get: (target, name) => (name === "now" ? () => TrueDate.now() + clockOffsetMs : target[name]),
});

// The library warns on stdout, which belongs to the answers.
console.log = console.warn = console.error = (...words) => process.stderr.write(`${words.join(" ")}\n`);
const opcua = require("node-opcua");

const { DataType, StatusCodes, Variant, OPCUAServer, MonitoredItem, Subscription } = opcua;

const settings = JSON.parse(process.argv[2]);
const PLANT_URI = "urn:opcua-detector:simulated-plant";
const CHANGES = 5000; // of the load, whose times are kept
const BATCH = 64; // rows published in one turn while catching up
const WRITABLE = opcua.makeAccessLevelFlag("CurrentRead | CurrentWrite");
const READABLE = opcua.makeAccessLevelFlag("CurrentRead");

MonitoredItem.minimumSamplingInterval = settings.min_sampling_ms ?? 1;
Subscription.minimumPublishingInterval = settings.min_publishing_ms ?? 10;

class Plant {
    constructor(addressSpace) {
        this.space = addressSpace;
        this.namespace = addressSpace.registerNamespace(PLANT_URI);
        this.folder = this.namespace.addObject({ organizedBy: addressSpace.rootFolder.objects, browseName: "Plant" });
        this.types = {};
        this.status = {};
        this.removed = {};
        this.variables = {};
        this.quirks = {};
        this.swapped = {};
        this.row = 0;
        this.late = 0;
        this.columns = settings.columns ?? [];
        this.period = settings.period_ms ?? 10;
        this.rows = settings.rows ? new Float64Array(fs.readFileSync(settings.rows).buffer.slice(0)) : null;
        for (const name of this.columns) {
            this.addTag(name);
        }
        this.addLoad(settings.load?.count ?? 0);
    }

    addTag(name) {
        const id = `s=${settings.process}.${name}`;
        this.types[name] ??= "Double";
        this.variables[name] = this.namespace.addVariable({
            componentOf: this.folder, browseName: name, nodeId: id, dataType: this.types[name],
            minimumSamplingInterval: 0, accessLevel: READABLE, userAccessLevel: READABLE,
        });
        if (settings.history_rows) {
            this.space.installHistoricalDataNode(this.variables[name], { maxOnlineValues: settings.history_rows });
        }
    }

    // Load variables count up, all in the same turn, `rate` times a second: a receiver sees what it missed.
    addLoad(count) {
        this.load = [];
        this.loadTurn = 0;
        this.loadChanges = []; // [stamp, when it was really changed], ms
        for (let k = 0; k < count; k++) {
            this.load.push(this.namespace.addVariable({
                componentOf: this.folder, browseName: `load${k}`, nodeId: `s=load.${k}`, dataType: "Double",
                minimumSamplingInterval: 0, accessLevel: READABLE, userAccessLevel: READABLE,
            }));
        }
    }

    start() {
        const zero = performance.now();
        this.startMs = TrueDate.now();
        if (this.rows) {
            this.every(zero, this.period, () => this.row, () => this.publishRow());
        }
        if (this.load.length && settings.load.rate > 0) {
            this.every(zero, 1000 / settings.load.rate, () => this.loadTurn, () => this.publishLoad());
        }
    }

    // By an absolute schedule: what was not published on time comes late, with the stamp it should have had.
    every(zero, periodMs, done, publish) {
        const turn = () => {
            const due = Math.floor((performance.now() - zero) / periodMs) + 1;
            for (let n = Math.min(due - done(), BATCH); n > 0; n--) {
                publish();
            }
            if (due - done() > 1) {
                this.late++;
            }
            setTimeout(turn, Math.max(0, zero + done() * periodMs - performance.now()));
        };
        turn();
    }

    publishRow() {
        const width = this.columns.length;
        const at = (this.row % (this.rows.length / width)) * width;
        const stamp = new Date(this.startMs + this.row * this.period + clockOffsetMs);
        this.columns.forEach((name, k) => {
            if (this.variables[name]) {
                this.report(name, { number: this.rows[at + k], status: this.status[name], stamp });
            }
        });
        this.row++;
    }

    // The quirks of the simulator (sim_server.quirks), by their names, each with its probability.
    report(name, sample) {
        const quirks = this.quirks[name] ?? {};
        const hit = (what) => Math.random() < (quirks[what] ?? 0);
        if (hit("nan") || hit("inf")) {
            sample.number = quirks.nan ? NaN : Infinity;
        }
        if (hit("overflow")) {
            sample.status = StatusCodes.GoodWithOverflowBit;
        }
        const held = this.swapped[name];
        delete this.swapped[name];
        if (!held && hit("swap")) { // it is reported after its successor
            this.swapped[name] = sample;
            return;
        }
        this.send(name, sample);
        if (hit("duplicate")) { // off by the last bit: the same again is no change
            this.send(name, { ...sample, number: sample.number * (1 + Number.EPSILON) });
        }
        if (held) {
            this.send(name, held);
        }
    }

    send(name, { number, status, stamp }) {
        this.set(this.variables[name], this.value(number, this.types[name]), status, stamp);
    }

    publishLoad() {
        const stamp = new Date(this.startMs + (this.loadTurn * 1000) / settings.load.rate + clockOffsetMs);
        this.loadTurn++;
        this.loadChanges.push([stamp.getTime(), performance.timeOrigin + performance.now()]);
        this.loadChanges.splice(0, this.loadChanges.length - CHANGES);
        for (const variable of this.load) {
            this.set(variable, { dataType: DataType.Double, value: this.loadTurn }, undefined, stamp);
        }
    }

    value(number, type) {
        const value = { Double: number, Float: number, Int32: Math.round(number), Boolean: number > 0,
                        String: `${number}` }[type];
        return { dataType: DataType[type], value };
    }

    set(variable, value, status, stamp) {
        variable.setValueFromSource(value, status ?? StatusCodes.Good, stamp);
    }
}

const server = new OPCUAServer(options());
const requests = {};
let plant = null;
let resultNodes = [];

function options() {
    const nodesets = [opcua.nodesets.standard, ...(settings.nodesets ?? [])];
    const secure = Boolean(settings.pki);
    const chosen = {
        hostname: "127.0.0.1", host: "127.0.0.1", port: settings.port, nodeset_filename: nodesets,
        alternateHostname: ["127.0.0.1"],
        securityModes: secure ? [1, 2, 3] : [opcua.MessageSecurityMode.None],
        securityPolicies: secure
            ? ["None", "Basic256Sha256", "Aes128_Sha256_RsaOaep", "Aes256_Sha256_RsaPss"].map((p) => opcua.SecurityPolicy[p])
            : [opcua.SecurityPolicy.None],
        allowAnonymous: true, disableDiscovery: false, registerServerMethod: 1, // hidden
        buildInfo: { productName: "second vendor" },
        serverInfo: { applicationUri: "urn:opcua-detector:second-vendor" },
        serverCapabilities: {
            // 0: an item that asks for sampling 0 gets every change, and not the last one of a window
            minSupportedSampleRate: settings.min_supported_ms ?? 0,
            maxSessions: 100, maxSubscriptionsPerSession: 100, maxSubscriptions: 1000,
            maxMonitoredItemsPerSubscription: settings.max_items_per_subscription ?? 100000,
            operationLimits: { ...(settings.operation_limits ?? {}) },
        },
        maxConnectionsPerEndpoint: 200,
        // A loaded test machine holds the process up for tenths of a second; the queue is not what is tried here.
        onCreateMonitoredItem: async (subscription, item) => {
            item.queueSize = settings.queue ?? Math.max(item.queueSize, 200);
        },
    };
    if (settings.users) {
        chosen.allowAnonymous = false;
        chosen.userManager = { isValidUser: (name, password) => settings.users[name] === password };
    }
    if (settings.certificate) {
        chosen.certificateFile = settings.certificate;
        chosen.privateKeyFile = settings.private_key;
    }
    // The library makes a certificate anyway; it goes where the test says and not into the user's home.
    const folder = settings.pki ?? settings.scratch;
    chosen.serverCertificateManager = new opcua.OPCUACertificateManager({
        automaticallyAcceptUnknownCertificate: true, rootFolder: path.join(folder, "server"),
    });
    chosen.userCertificateManager = new opcua.OPCUACertificateManager({
        automaticallyAcceptUnknownCertificate: true, rootFolder: path.join(folder, "user"),
    });
    return chosen;
}

function sessions() {
    return Object.values(server.engine._sessions);
}

function owners() {
    return sessions().filter((session) => session.currentSubscriptionCount > 0);
}

function tellNoLimit(node) {
    node?.bindVariable({ get: () => new Variant({ dataType: DataType.UInt32, value: 0 }) }, true);
}

function findNode(name) {
    return plant.variables[name] ?? resultNodes.find((node) => node.nodeId.value === name);
}

const commands = {
    stats: () => ({
        rows: plant.row, late: plant.late, load_turns: plant.loadTurn, requests: { ...requests },
        sessions: sessions().length, subscriptions: server.engine.currentSubscriptionCount,
        items: owners().flatMap((s) => s.publishEngine.subscriptions).map((s) => s.monitoredItemCount),
        cpu_us: process.cpuUsage().user + process.cpuUsage().system,
    }),
    changes: () => ({ changes: plant.loadChanges }),
    status: ({ names, code }) => {
        for (const name of names) {
            plant.status[name] = StatusCodes[code];
        }
    },
    clock: ({ offset_ms }) => {
        clockOffsetMs = offset_ms;
    },
    quirk: ({ names, quirk, value }) => {
        for (const name of names) {
            (plant.quirks[name] ??= {})[quirk] = value;
        }
    },
    clear_quirks: () => {
        plant.quirks = {};
    },
    remove: ({ name }) => {
        const node = findNode(name);
        if (node === plant.variables[name]) {
            delete plant.variables[name];
        } else {
            resultNodes = resultNodes.filter((one) => one !== node);
            plant.removed[name] = { browseName: node.browseName.name, nodeId: node.nodeId, dataType: node.dataType,
                                    valueRank: node.valueRank };
        }
        plant.space.deleteNode(node.nodeId);
    },
    restore: ({ name }) => {
        const was = plant.removed[name];
        if (!was) {
            plant.addTag(name);
            return;
        }
        delete plant.removed[name];
        const namespace = plant.space.getNamespace(was.nodeId.namespace);
        resultNodes.push(namespace.addVariable({ organizedBy: plant.space.rootFolder.objects, ...was,
            minimumSamplingInterval: 0, accessLevel: WRITABLE, userAccessLevel: WRITABLE }));
    },
    type: ({ name, type }) => {
        const variable = plant.variables[name];
        plant.types[name] = type;
        variable.$dataValue.value = new Variant(plant.value(0, type)); // the library refuses another type otherwise
        variable.dataType = opcua.resolveNodeId(DataType[type]);
        variable._basicDataType = undefined;
    },
    access: ({ prefix, writable }) => {
        for (const node of resultNodes.filter((one) => String(one.nodeId.value).startsWith(prefix))) {
            node.accessLevel = node.userAccessLevel = writable ? WRITABLE : READABLE;
        }
    },
    delete_subscriptions: () => {
        for (const session of owners()) {
            for (const subscription of [...session.publishEngine.subscriptions]) {
                session.deleteSubscription(subscription.id);
            }
        }
    },
    // As if the client had asked for nothing in the whole life of the subscription.
    expire_subscriptions: () => {
        for (const subscription of owners().flatMap((session) => [...session.publishEngine.subscriptions])) {
            subscription._life_time_counter = subscription.lifeTimeCount;
            subscription._tick();
        }
    },
    close_sessions: () => {
        for (const session of owners()) {
            server.engine.closeSession(session.authenticationToken, true, "Forcing");
        }
    },
    max_sessions: ({ n }) => {
        server.engine.serverCapabilities.maxSessions = n;
    },
    max_items: ({ n, hidden }) => {
        if (hidden) {
            tellNoLimit(plant.space.rootFolder.objects.server.serverCapabilities.maxMonitoredItemsPerSubscription);
        }
        server.engine.serverCapabilities.maxMonitoredItemsPerSubscription = n;
        for (const subscription of owners().flatMap((session) => session.publishEngine.subscriptions)) {
            subscription.serverCapabilities.maxMonitoredItemsPerSubscription = n;
        }
    },
    // The library takes it for a bug of its own when more requests wait than are allowed: lowered with their number.
    publish_limit: ({ n }) => {
        opcua.ServerSession.maxPublishRequestInQueue = n;
        const engines = sessions().map((session) => session.publishEngine);
        const lower = () => {
            for (const engine of engines) {
                engine.maxPublishRequestInQueue = Math.max(n, engine.pendingPublishRequestCount);
            }
            if (engines.some((engine) => engine.maxPublishRequestInQueue > n)) {
                setTimeout(lower, 20);
            }
        };
        lower();
    },
    // What is enforced, while the nodes that tell of it say 0 (no limit) where `hidden` is set.
    limits: ({ limits, hidden }) => {
        const enforced = server.engine.serverCapabilities.operationLimits;
        for (const [name, n] of Object.entries(limits)) {
            enforced[name] = n;
        }
        if (hidden) {
            const told = plant.space.rootFolder.objects.server.serverCapabilities.operationLimits;
            for (const name of Object.keys(limits)) {
                tellNoLimit(told[name]);
            }
        }
    },
    stop: () => {
        setTimeout(() => void end(0), 0);
    },
};

async function end(code) {
    setTimeout(() => process.exit(code), 3000).unref();
    await server.shutdown(0);
    process.exit(code);
}

function answer(content) {
    process.stdout.write(`${JSON.stringify(content)}\n`);
}

async function main() {
    await server.initialize();
    const space = server.engine.addressSpace;
    for (const uri of settings.namespaces_before ?? []) {
        space.registerNamespace(uri);
    }
    plant = new Plant(space);
    const results = space.getNamespaceArray().find((one) => one.namespaceUri === "urn:opcua-detector:results");
    if (results) {
        for (const node of results.nodeIterator()) {
            if (node.nodeClass === opcua.NodeClass.Variable) {
                node.accessLevel = node.userAccessLevel = WRITABLE;
                resultNodes.push(node);
            }
        }
    }
    server.on("request", (request) => {
        const name = request.constructor.name;
        requests[name] = (requests[name] ?? 0) + 1;
    });
    await server.start();
    plant.start();
    answer({ ready: true, pid: process.pid, port: server.endpoints[0].port, results: resultNodes.length,
             namespaces: space.getNamespaceArray().map((one) => one.namespaceUri) });
}

readline.createInterface({ input: process.stdin }).on("line", (line) => {
    const { do: what, ...how } = JSON.parse(line);
    try {
        answer({ ok: true, ...(commands[what](how) ?? {}) });
    } catch (error) {
        answer({ ok: false, error: String(error.stack ?? error) });
    }
}).on("close", () => process.exit(0));

main().catch((error) => {
    process.stderr.write(`${error.stack ?? error}\n`);
    process.exit(1);
});
