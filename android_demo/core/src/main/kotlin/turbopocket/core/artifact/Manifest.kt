// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.artifact

import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive

const val MANIFEST_NAME = "manifest.json"
const val SCHEMA_VERSION = 2

/**
 * `manifest.json` of schema 2, field by field as docs/manifest.md and runtimes/manifest.py have it.
 *
 * Unknown fields are refused. Made by [readManifest], which also checks what the types do not say.
 */
@Serializable
data class Manifest(
    @SerialName("schema_version") val schemaVersion: Int,
    val name: String,
    val family: String,
    val target: String,
    val files: List<FileEntry>,
    val components: Map<String, ComponentSpec>,
    val tokenizers: Map<String, String>,
    @SerialName("prompt_replacements") val promptReplacements: Map<String, Map<String, String>> = emptyMap(),
    val pipeline: Pipeline,
    val sampler: JsonObject,
    @SerialName("sampler_table") val samplerTable: SamplerTable? = null,
    @SerialName("only_these_steps") val onlyTheseSteps: Boolean = false,
    val image: ImageSpec,
    /** [height, width] in pixels of all pictures that it draws; the first is that of `image`. */
    val sizes: List<List<Int>>,
    val tools: Map<String, String>,
    val recipe: String,
    /** What it was made from; artifacts may come without. */
    val model: ModelOrigin? = null,
    /** What was changed in the denoiser's graph; whoever runs all of an artifact's files has nothing to do. */
    val rewrites: List<JsonObject> = emptyList(),
    /** What opens the files, and with which options: for people, since one runtime is built in. */
    val runtime: JsonObject? = null,
    val notes: List<String> = emptyList(),
    val plan: JsonObject? = null,
    val parity: JsonObject? = null,
    /** What a device has to compute before it may draw; artifacts may come without. */
    @SerialName("self_check") val selfCheck: SelfCheckSpec? = null,
)

/** The model an artifact was made from, the hash of its weights, configs and tokenizers, and what its card says. */
@Serializable
data class ModelOrigin(
    val name: String,
    val sha256: String,
    val license: String? = null,
    val author: String? = null,
)

/** One stored file: its path inside the artifact, its length and its SHA-256. */
@Serializable
data class FileEntry(val path: String, val bytes: Long, val sha256: String)

/** A named tensor; a dimension is a number, or a name when it may vary from call to call. */
@Serializable
data class TensorSpec(val name: String, val dtype: String, val shape: List<JsonPrimitive>)

/** One graph: its main file, and the tensors that it has. */
@Serializable
data class ComponentSpec(
    val file: String,
    val data: String? = null,
    val packages: List<String> = emptyList(),
    val inputs: List<TensorSpec>,
    val outputs: List<TensorSpec>,
    /** How the loop's tensors differ from the files': Core ML's alone have one, which no Android runtime opens. */
    val loop: JsonObject? = null,
)

/** The picture in pixels and its latents; latents = (z - mean) * scaling factor / std by channel. */
@Serializable
data class ImageSpec(
    val height: Int,
    val width: Int,
    @SerialName("latent_channels") val latentChannels: Int,
    @SerialName("latent_height") val latentHeight: Int,
    @SerialName("latent_width") val latentWidth: Int,
    @SerialName("vae_scaling_factor") val vaeScalingFactor: Float,
    @SerialName("latents_mean") val latentsMean: List<Float>? = null,
    @SerialName("latents_std") val latentsStd: List<Float>? = null,
)

@Serializable
data class Pipeline(
    @SerialName("text_encoders") val textEncoders: Map<String, TextEncoder>,
    val denoiser: Denoiser,
    @SerialName("without_prompt") val withoutPrompt: String,
    val decoder: Decoder,
    val encoder: Encoder? = null,
)

/** Names of a text encoder's inputs, each [1, T]. */
@Serializable
data class TextEncoder(val ids: String = "input_ids", @SerialName("attention_mask") val attentionMask: String? = null)

@Serializable
data class Denoiser(
    val component: String,
    val latents: String,
    val timestep: String,
    val inputs: Map<String, Feed>,
    val output: String,
    val channels: String = "all",
)

@Serializable
data class Decoder(val component: String, val latents: String, val output: String)

@Serializable
data class Encoder(val component: String, val picture: String, val output: String, val gives: String)

@Serializable
data class Output(val component: String, val output: String)

/** What one input of the denoiser is. */
@Serializable
sealed interface Feed

/** Outputs of text encoders that read the prompt, joined in this order along the last dimension. */
@Serializable
@SerialName("text")
data class TextFeed(val join: List<Output>) : Feed

/** Of the ids that a text encoder read, 1 for a token and 0 for padding, [1, T]. */
@Serializable
@SerialName("attention_mask")
data class MaskFeed(val component: String) : Feed

/** Numbers [1, n]; words stand for the picture's: `height`, `width`, `aspect_ratio`. */
@Serializable
@SerialName("numbers")
data class NumbersFeed(val values: List<JsonPrimitive>) : Feed

/** The guidance scale as sines and cosines [1, width]. */
@Serializable
@SerialName("guidance")
data class GuidanceFeed(val width: Int) : Feed

/** A sampler's walk at the manifest's number of steps: see docs/manifest.md, "The walk". */
@Serializable
data class SamplerTable(
    @SerialName("init_scale") val initScale: Float,
    val bound: Float? = null,
    val rows: List<SamplerRow>,
)

@Serializable
data class SamplerRow(
    val timestep: Float,
    val signal: Float,
    val noise: Float,
    @SerialName("input_scale") val inputScale: Float,
    val estimate: Map<Operand, Float>? = null,
    val steps: List<SamplerStep>,
)

@Serializable
data class SamplerStep(val next: Map<Operand, Float>, val remember: Map<Operand, Float>? = null)

/** What a step adds up. */
@Serializable
enum class Operand {
    @SerialName("x") X,
    @SerialName("output") OUTPUT,
    @SerialName("estimate") ESTIMATE,
    @SerialName("noise") NOISE,
    @SerialName("first") FIRST,
    @SerialName("remembered_1") REMEMBERED_1,
    @SerialName("remembered_2") REMEMBERED_2,
    @SerialName("remembered_3") REMEMBERED_3,
}

/**
 * One walk that a device repeats before it draws: of [prompt] and [seed], at the artifact's first size and own
 * guidance, up to row [step] of the sampler's table. [latents]: those after that row, float32, little-endian,
 * [1, C, h, w]; [picture]: what the decoder makes of them, bytes [H, W, 3].
 */
@Serializable
data class SelfCheckSpec(
    val prompt: String,
    val seed: Long,
    val step: Int,
    val latents: ExpectedOutput,
    val picture: ExpectedOutput,
)

/** The file of what has to be computed, and the least signal over difference, in dB. */
@Serializable
data class ExpectedOutput(val file: String, @SerialName("snr_floor_db") val snrFloorDb: Float)
