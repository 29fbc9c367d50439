// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.drawing

import turbopocket.core.artifact.Artifact
import turbopocket.core.artifact.Feed
import turbopocket.core.artifact.GuidanceFeed
import turbopocket.core.artifact.MaskFeed
import turbopocket.core.artifact.NumbersFeed
import turbopocket.core.artifact.TextFeed
import turbopocket.core.artifact.component
import turbopocket.core.refuse
import turbopocket.core.text.ClipTokenizer
import turbopocket.core.text.Tokens
import kotlin.math.cos
import kotlin.math.exp
import kotlin.math.ln
import kotlin.math.sin

/** From words to what the denoiser is told at every step, as the manifest's pipeline says it. */
internal class Conditioning(private val artifact: Artifact) {
    private val pipeline = artifact.manifest.pipeline
    private val tokenizers = pipeline.textEncoders.keys.associateWith(::tokenizer)

    /** For each text encoder the end of [prompt] that it does not read, where there is one. */
    fun cut(prompt: String): Map<String, String> =
        tokenizers.mapNotNull { (name, tokenizer) -> tokenizer.encode(prompt).cut?.let { name to it } }.toMap()

    /** The denoiser's inputs for a prompt but the guidance. */
    fun of(prompt: String, size: PictureSize, components: Components): Map<String, Tensor> {
        val read = tokenizers.mapValues { it.value.encode(prompt) }
        val outputs = read.mapValues { (name, tokens) -> encoded(name, tokens, components) }
        return pipeline.denoiser.inputs.filterValues { it !is GuidanceFeed }
            .mapValues { (_, feed) -> fed(feed, size, read, outputs) }
    }

    /** What guidance steers away from: the negative prompt, else zeros or the empty prompt, as the model has it. */
    fun away(
        negativePrompt: String?,
        conditional: Map<String, Tensor>,
        size: PictureSize,
        components: Components,
    ): Map<String, Tensor> {
        if (negativePrompt != null || pipeline.withoutPrompt != "zeros") {
            return of(negativePrompt ?: "", size, components)
        }
        return conditional.mapValues { (name, told) ->
            val text = pipeline.denoiser.inputs[name] is TextFeed
            if (text) Tensor(told.shape, FloatArray(told.values.size)) else told
        }
    }

    /** The guidance as a denoiser is told it that takes it; empty for all others. */
    fun guidance(scale: Float): Map<String, Tensor> = pipeline.denoiser.inputs.mapNotNull { (name, feed) ->
        (feed as? GuidanceFeed)?.let { name to Tensor.row(guidanceEmbedding(scale, it.width)) }
    }.toMap()

    private fun tokenizer(encoder: String): ClipTokenizer {
        val manifest = artifact.manifest
        val ids = pipeline.textEncoders.getValue(encoder).ids
        val spec = manifest.component(encoder).inputs.first { it.name == ids }
        val length = spec.shape.lastOrNull()?.takeUnless { it.isString }?.content?.toIntOrNull()
            ?: refuse("$encoder has a tokenizer but no input $ids of a fixed length")
        if (length !in 2..MOST_IDS) refuse("$encoder reads $length ids; 2 to $MOST_IDS are possible")
        val file = artifact.file("${manifest.tokenizers.getValue(encoder)}/tokenizer.json")
        return ClipTokenizer(file, length, manifest.promptReplacements[encoder].orEmpty())
    }

    private fun encoded(name: String, tokens: Tokens, components: Components): Map<String, Tensor> {
        val encoder = pipeline.textEncoders.getValue(name)
        val inputs = hashMapOf(encoder.ids to row(tokens.ids))
        encoder.attentionMask?.let { inputs[it] = row(tokens.mask) }
        return components.run(name, inputs)
    }

    private fun fed(
        feed: Feed,
        size: PictureSize,
        read: Map<String, Tokens>,
        outputs: Map<String, Map<String, Tensor>>,
    ): Tensor = when (feed) {
        is TextFeed -> joined(feed.join.map { outputs.getValue(it.component).getValue(it.output) })
        is MaskFeed -> row(read.getValue(feed.component).mask)
        is NumbersFeed -> Tensor.row(FloatArray(feed.values.size) { size.number(feed.values[it].content) })
        is GuidanceFeed -> error("the guidance is no part of a prompt")
    }

    private fun row(numbers: IntArray) = Tensor.row(FloatArray(numbers.size) { numbers[it].toFloat() })
}

/** Of a prompt: published text encoders read 77 to 512. */
private const val MOST_IDS = 4096

/** A picture's sides in pixels. */
data class PictureSize(val height: Int, val width: Int) {
    override fun toString() = "${width}x$height"

    internal fun number(word: String): Float = when (word) {
        "height" -> height.toFloat()
        "width" -> width.toFloat()
        "aspect_ratio" -> (height.toDouble() / width).toFloat()
        else -> word.toFloat()
    }
}

/**
 * A guidance scale's embedding [width]: sines, then cosines of 1000 (scale - 1) f_k, f_k from 1 to 1/10000 in geometric
 * steps (Kingma et al. 2021, arXiv 2107.00630); rounded to float32 where the code is that LCMs were trained with.
 */
internal fun guidanceEmbedding(scale: Float, width: Int): FloatArray {
    val half = width / 2
    val exponent = ln(10000.0).toFloat() / (half - 1)
    val angles = FloatArray(half) { (scale - 1f) * 1000f * exp(-(exponent * it).toDouble()).toFloat() }
    return FloatArray(width) {
        when {
            it < half -> sin(angles[it].toDouble()).toFloat()
            it < 2 * half -> cos(angles[it - half].toDouble()).toFloat()
            else -> 0f
        }
    }
}
