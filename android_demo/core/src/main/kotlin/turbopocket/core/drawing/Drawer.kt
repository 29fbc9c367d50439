// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.drawing

import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.floatOrNull
import kotlinx.serialization.json.intOrNull
import turbopocket.core.artifact.Artifact
import turbopocket.core.artifact.SamplerTable
import turbopocket.core.artifact.component
import turbopocket.core.noise.StandardNormal
import turbopocket.core.refuse

/** What is drawn: [guidance] is the artifact's by default, [size] its first. */
data class Wish(
    val prompt: String,
    val seed: Long,
    val negativePrompt: String? = null,
    val guidance: Float? = null,
    val size: PictureSize? = null,
)

/** How far a drawing is: [done] of [total] calls, the last of [component]. */
data class Progress(val component: String, val done: Int, val total: Int)

/** A walk's [first] and last [latents], and the picture that the decoder makes of these; null for one not finite. */
internal class CheckedWalk(
    val first: FloatArray,
    val latents: FloatArray,
    val height: Int,
    val width: Int,
    val picture: Picture?,
)

/**
 * Text to image over a runtime, as the manifest's pipeline says it: the loop of `turbopocket generate`.
 *
 * With [keepOpen] false one component at a time is in memory. Nothing is open between drawings, nor after a cancelled
 * or failed one.
 */
class Drawer(private val artifact: Artifact, private val runtime: Runtime, private val keepOpen: Boolean = false) {
    private val manifest = artifact.manifest
    private val table: SamplerTable = manifest.samplerTable
        ?: refuse("${manifest.name} was built before manifests had a sampler table: build it again")
    private val conditioning = Conditioning(artifact)

    init {
        runtime.requireTarget(manifest)
    }

    /** The number of steps of sampling that the artifact's table is for. */
    val steps: Int get() = (manifest.sampler["steps"] as? JsonPrimitive)?.intOrNull ?: table.rows.size

    /** For each text encoder the end of [prompt] that it does not read, where there is one. */
    fun cut(prompt: String): Map<String, String> = conditioning.cut(prompt)

    /**
     * The picture of a wish; the same as Python's within a rounding. Throws Refused for what the artifact does not do
     * and for a runtime that computes nonsense, Cancelled when [cancellation] says so.
     */
    fun draw(
        wish: Wish,
        cancellation: Cancellation = Cancellation(),
        progress: (Progress) -> Unit = {},
    ): Picture = Components(artifact, runtime, keepOpen, cancellation).use { components ->
        val size = sizeOf(wish)
        val plan = PlannedCalls(wish, progress)
        val latents = plan.walk(components, size, table.rows.size)
        decoded(latents, size, components).also { plan.called(manifest.pipeline.decoder.component) }
    }

    /** What the first [rows] calls of a walk to the artifact's first size come to. */
    internal fun checked(wish: Wish, rows: Int, cancellation: Cancellation = Cancellation()): CheckedWalk =
        Components(artifact, runtime, keepOpen, cancellation).use { components ->
            val size = sizeOf(wish)
            val latents = PlannedCalls(wish) {}.walk(components, size, rows)
            val sample = sampled(latents, size, components)
            val finite = sample.all { it.isFinite() }
            val first = Walk(table, StandardNormal(wish.seed)::next).begin(latents.values.size)
            val drawn = if (finite) picture(sample, size) else null
            CheckedWalk(first, latents.values, size.height, size.width, drawn)
        }

    /** One drawing's calls, counted. */
    private inner class PlannedCalls(private val wish: Wish, private val progress: (Progress) -> Unit) {
        private val scale = wish.guidance ?: (manifest.sampler["guidance_scale"] as? JsonPrimitive)?.floatOrNull ?: 1f
        private val told = conditioning.guidance(scale)
        private val twice = scale > 1 && told.isEmpty()
        private val total = manifest.pipeline.textEncoders.size + table.rows.size + 1
        private var done = 0

        init {
            if (wish.prompt.isBlank()) refuse("the prompt is empty: say what the picture should show")
            if (wish.seed < 0) refuse("seed ${wish.seed} is below 0")
            if (wish.negativePrompt != null && !twice) {
                refuse("a negative prompt has no effect here: the denoiser is asked once a step")
            }
        }

        fun called(component: String, calls: Int = 1) {
            done += calls
            progress(Progress(component, done, total))
        }

        fun walk(components: Components, size: PictureSize, rows: Int): Tensor {
            val conditional = conditioning.of(wish.prompt, size, components) + told
            val away = if (twice) conditioning.away(wish.negativePrompt, conditional, size, components) else null
            val encoders = manifest.pipeline.textEncoders
            if (encoders.isNotEmpty()) called(encoders.keys.last(), encoders.size)
            val noise = StandardNormal(wish.seed)
            val walk = Walk(table, noise::next)
            val shape = latentShape(size)
            var x = walk.begin(shape.fold(1, Int::times))
            for (row in table.rows.take(rows)) {
                val asked = mapOf(
                    manifest.pipeline.denoiser.latents to Tensor(shape, walk.input(row, x)),
                    manifest.pipeline.denoiser.timestep to timestep(row.timestep),
                )
                val output = prediction(components, asked + conditional)
                if (away != null) guide(output, prediction(components, asked + away), scale)
                x = walk.step(row, x, output)
                called(manifest.pipeline.denoiser.component)
            }
            return Tensor(shape, x)
        }
    }

    private fun sizeOf(wish: Wish): PictureSize {
        val sizes = manifest.sizes.map { PictureSize(it[0], it[1]) }
        val size = wish.size ?: sizes[0]
        if (size !in sizes) refuse("$size was asked; ${manifest.name} was built for ${sizes.joinToString()}")
        return size
    }

    private fun latentShape(size: PictureSize): IntArray = manifest.image.run {
        intArrayOf(1, latentChannels, size.height / (height / latentHeight), size.width / (width / latentWidth))
    }

    /** A scalar or [1], as the denoiser has it. */
    private fun timestep(value: Float): Tensor {
        val denoiser = manifest.pipeline.denoiser
        val spec = manifest.component(denoiser.component).inputs.first { it.name == denoiser.timestep }
        return Tensor(IntArray(spec.shape.size) { 1 }, floatArrayOf(value))
    }

    private fun prediction(components: Components, inputs: Map<String, Tensor>): FloatArray {
        val denoiser = manifest.pipeline.denoiser
        val latents = inputs.getValue(denoiser.latents).shape
        val channels = if (denoiser.channels == "all") latents[1] else 2 * latents[1]
        val output = components.run(denoiser.component, inputs, denoiser.output)
        requireShape(denoiser.component, output, intArrayOf(latents[0], channels, latents[2], latents[3]))
        return output.values.copyOf(latents.fold(1, Int::times))
    }

    /** Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), in the place of [conditional]. */
    private fun guide(conditional: FloatArray, away: FloatArray, scale: Float) {
        for (index in conditional.indices) {
            conditional[index] = away[index] + scale * (conditional[index] - away[index])
        }
    }

    private fun decoded(latents: Tensor, size: PictureSize, components: Components): Picture {
        val sample = sampled(latents, size, components)
        val odd = sample.count { !it.isFinite() }
        if (odd > 0) refuse("${manifest.name}: $odd of ${sample.size} values of the picture are not finite")
        return picture(sample, size)
    }

    /** The decoder's output [1, 3, H, W] in -1..1. */
    private fun sampled(latents: Tensor, size: PictureSize, components: Components): FloatArray {
        val decoder = manifest.pipeline.decoder
        val output = components.run(decoder.component, mapOf(decoder.latents to toVae(latents)), decoder.output)
        requireShape(decoder.component, output, intArrayOf(1, 3, size.height, size.width))
        return output.values
    }

    private fun picture(sample: FloatArray, size: PictureSize): Picture {
        val plane = size.height * size.width
        val pixels = ByteArray(3 * plane)
        for (index in 0 until plane) {
            for (channel in 0 until 3) {
                val value = (sample[channel * plane + index] / 2 + 0.5f).coerceIn(0f, 1f)
                pixels[3 * index + channel] = Math.rint((value * 255f).toDouble()).toInt().toByte()
            }
        }
        return Picture(size.height, size.width, pixels)
    }

    private fun requireShape(component: String, found: Tensor, wanted: IntArray) {
        if (!found.shape.contentEquals(wanted)) {
            refuse("$component gives ${found.shape.toList()}; ${wanted.toList()} is needed")
        }
    }

    /** z of latents: latents * std / scaling factor + mean by channel, without mean and std where none are. */
    private fun toVae(latents: Tensor): Tensor {
        val image = manifest.image
        val plane = latents.shape[2] * latents.shape[3]
        val values = FloatArray(latents.values.size) {
            val channel = it / plane
            val scaled = latents.values[it] * (image.latentsStd?.get(channel) ?: 1f) / image.vaeScalingFactor
            scaled + (image.latentsMean?.get(channel) ?: 0f)
        }
        return Tensor(latents.shape, values)
    }
}
