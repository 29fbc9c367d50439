// SPDX-License-Identifier: Apache-2.0
// Draws from an ONNX artifact with nothing but its manifest, in Node or in a browser: text to image at the artifact's own
// size, number of steps and guidance. `docs/manifest.md` explains each part.

/** Tensors by name for the inputs of a component that the manifest lists. `type` "int64" takes BigInt64Array. */
function tensor(ort, spec, values, shape) {
  if (spec.dtype === "int64") return new ort.Tensor("int64", BigInt64Array.from(values, (v) => BigInt(Math.round(v))), shape);
  return new ort.Tensor("float32", Float32Array.from(values), shape);
}

/** CLIP's byte-level BPE as `tokenizer.json` has it. `length` ids, padded as the file says. */
export class ClipTokenizer {
  constructor(rules, length) {
    const { vocab, merges } = rules.model;
    this.vocab = vocab;
    this.rank = new Map(merges.map((pair, i) => [Array.isArray(pair) ? pair.join(" ") : pair, i]));
    this.added = new Map(rules.added_tokens.map((each) => [each.content, each.id]));
    const [split] = rules.pre_tokenizer.pretokenizers;
    this.words = new RegExp(split.pattern.Regex, "gu");
    this.end = rules.post_processor.sep[1];
    this.start = rules.post_processor.cls[1];
    this.pad = rules.padding.pad_id;
    this.length = length;
    const printable = (b) => (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
    let next = 0x100;
    this.letter = Array.from({ length: 256 }, (_, b) => String.fromCharCode(printable(b) ? b : next++));
  }

  encode(text) {
    const tokens = [...this.added.keys()].map((each) => each.replace(/[^\w\s]/gu, "\\$&"));
    const ids = text.split(new RegExp(`(${tokens.join("|")})`)).flatMap((part) => {
      if (this.added.has(part)) return [this.added.get(part)]; // a token of its own, wherever it stands
      const clean = part.normalize("NFC").replace(/\s+/gu, " ").toLowerCase();
      return (clean.match(this.words) ?? []).flatMap((word) => this.#pieces(word));
    });
    const kept = [this.start, ...ids.slice(0, this.length - 2), this.end];
    return [...kept, ...Array(this.length - kept.length).fill(this.pad)];
  }

  #pieces(word) {
    const parts = Array.from(new TextEncoder().encode(word), (byte) => this.letter[byte]);
    parts[parts.length - 1] += "</w>";
    for (;;) {
      let best = -1;
      let rank = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const found = this.rank.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (found < rank) [best, rank] = [i, found];
      }
      if (best < 0) return parts.map((part) => this.vocab[part] ?? this.end);
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
  }
}

/** [..., a] and [..., b] side by side along the last dimension. */
function joined(states) {
  const widths = states.map((state) => state.dims.at(-1));
  const width = widths.reduce((a, b) => a + b);
  const rows = states[0].data.length / widths[0];
  const data = new Float32Array(rows * width);
  let at = 0;
  states.forEach((state, k) => {
    for (let row = 0; row < rows; row++) data.set(state.data.subarray(row * widths[k], (row + 1) * widths[k]), row * width + at);
    at += widths[k];
  });
  return { data, dims: [...states[0].dims.slice(0, -1), width] };
}

/** Standard normal numbers; an artifact draws the same picture everywhere from the same ones. */
export function noise(count) {
  return Float32Array.from({ length: count }, () => {
    return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
  });
}

/**
 * ort: the module onnxruntime-node or onnxruntime-web. readJson(path), session(component, spec): how to get at files.
 * normal(count): where noise comes from. Returns { width, height, rgb: Uint8Array }.
 */
export async function draw({ ort, readJson, session, prompt, normal = noise }) {
  const manifest = await readJson("manifest.json");
  const { pipeline, image, sampler, sampler_table: table, components } = manifest;
  if (manifest.schema_version !== 2 || manifest.target !== "onnx") throw new Error("not an ONNX artifact of schema 2");
  if (sampler.guidance_scale > 1) throw new Error("this example draws without guidance");
  const run = async (name, feeds) => {
    const spec = components[name];
    const inputs = Object.fromEntries(
      spec.inputs.map((each) => [each.name, tensor(ort, each, feeds[each.name].data, feeds[each.name].dims)]),
    );
    const opened = await session(name, spec);
    try {
      return await opened.run(inputs);
    } finally {
      await opened.release(); // one component in memory at a time
    }
  };

  // 1. Text.
  const outputs = {};
  for (const [name, encoder] of Object.entries(pipeline.text_encoders)) {
    const length = components[name].inputs.find((each) => each.name === encoder.ids).shape.at(-1);
    const rules = await readJson(`${manifest.tokenizers[name]}/tokenizer.json`);
    outputs[name] = await run(name, { [encoder.ids]: { data: new ClipTokenizer(rules, length).encode(prompt), dims: [1, length] } });
  }

  // 2. What the denoiser is told at every step.
  const told = {};
  for (const [name, feed] of Object.entries(pipeline.denoiser.inputs)) {
    if (feed.kind === "text") told[name] = joined(feed.join.map((each) => outputs[each.component][each.output]));
    else if (feed.kind === "numbers") {
      const words = { height: image.height, width: image.width, aspect_ratio: image.height / image.width };
      told[name] = { data: feed.values.map((each) => words[each] ?? each), dims: [1, feed.values.length] };
    } else throw new Error(`this example knows no input of kind ${feed.kind}`);
  }

  // 3. The walk: each step is a sum.
  const dims = [1, image.latent_channels, image.latent_height, image.latent_width];
  const count = dims.reduce((a, b) => a * b);
  const { denoiser, decoder } = pipeline;
  const sum = (coefficients, values) => {
    const total = new Float32Array(count);
    for (const [name, factor] of Object.entries(coefficients)) {
      const value = name === "noise" ? normal(count) : values[name];
      for (let i = 0; i < count; i++) total[i] += factor * value[i];
    }
    return total;
  };
  let x = normal(count).map((each) => each * table.init_scale);
  const first = x;
  let remembered = [];
  const timestep = components[denoiser.component].inputs.find((each) => each.name === denoiser.timestep);
  const unet = await session(denoiser.component, components[denoiser.component]); // stays open for all steps
  for (const [index, row] of table.rows.entries()) {
    const feeds = {
      ...told,
      [denoiser.latents]: { data: x.map((each) => each * row.input_scale), dims },
      [denoiser.timestep]: { data: [row.timestep], dims: timestep.shape.map(() => 1) },
    };
    const inputs = Object.fromEntries(
      components[denoiser.component].inputs.map((each) => [each.name, tensor(ort, each, feeds[each.name].data, feeds[each.name].dims)]),
    );
    const output = (await unet.run(inputs))[denoiser.output].data.subarray(0, count); // "first half": the rest is variance
    const step = row.steps[Math.min(index, row.steps.length - 1)];
    const values = { x, output, first };
    remembered.forEach((each, age) => (values[`remembered_${age + 1}`] = each));
    if (row.estimate) values.estimate = sum(row.estimate, values).map((e) => Math.max(-table.bound, Math.min(table.bound, e)));
    const next = sum(step.next, values);
    if (step.remember) remembered = [sum(step.remember, values), ...remembered].slice(0, 3);
    x = next;
  }
  await unet.release();

  // 4. The picture.
  const area = image.latent_height * image.latent_width;
  const z = x.map((each, i) => {
    const channel = Math.floor(i / area);
    if (!image.latents_mean) return each / image.vae_scaling_factor;
    return (each * image.latents_std[channel]) / image.vae_scaling_factor + image.latents_mean[channel];
  });
  const sample = (await run(decoder.component, { [decoder.latents]: { data: z, dims } }))[decoder.output].data;
  const pixels = image.width * image.height;
  const rgb = new Uint8Array(3 * pixels);
  for (let i = 0; i < pixels; i++)
    for (let c = 0; c < 3; c++) rgb[3 * i + c] = Math.round(255 * Math.max(0, Math.min(1, sample[c * pixels + i] / 2 + 0.5)));
  return { width: image.width, height: image.height, rgb };
}
