// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.drawing

import turbopocket.core.artifact.Artifact
import turbopocket.core.artifact.ExpectedOutput
import turbopocket.core.artifact.MANIFEST_NAME
import turbopocket.core.artifact.sha256
import turbopocket.core.refuse
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.log10

/**
 * What a device's arithmetic came to: dB of signal over difference for each output, infinite for none, and the
 * [floorsDb] that are asked.
 */
data class SelfCheckResult(val snrDb: Map<String, Double>, val floorsDb: Map<String, Double>) {
    val passed: Boolean get() = failure == null

    /** One sentence on the first output below its floor, or null. */
    val failure: String?
        get() = floorsDb.entries.find { (name, floor) -> snrDb.getValue(name) < floor }?.let { (name, floor) ->
            "this device computes wrong: $name of the self-check have ${decibel(snrDb.getValue(name))} of signal " +
                "over difference, ${decibel(floor)} are needed"
        }

    private fun decibel(value: Double) = String.format(java.util.Locale.ROOT, "%.1f dB", value)
}

/**
 * A walk that the build recorded, repeated once per device and artifact before anything is drawn: drivers and chips
 * that compute wrong give wrong pictures, not errors.
 */
class SelfCheck(private val artifact: Artifact, private val runtime: Runtime) {
    /** The result, or null for an artifact that records none. Throws Refused for a record that does not fit. */
    fun run(cancellation: Cancellation = Cancellation()): SelfCheckResult? {
        val spec = artifact.manifest.selfCheck ?: return null
        val rows = artifact.manifest.samplerTable?.rows.orEmpty().size
        if (spec.step !in 0 until rows) refuse("self_check is of step ${spec.step}; there are $rows")
        val found = Drawer(artifact, runtime).checked(Wish(spec.prompt, spec.seed), spec.step + 1, cancellation)
        val bytes = ByteBuffer.wrap(expected(spec.latents, 4L * found.latents.size)).order(ByteOrder.LITTLE_ENDIAN)
        val latents = FloatArray(found.latents.size) { bytes.getFloat() }
        val picture = centred(expected(spec.picture, 3L * found.height * found.width))
        val ratios = mapOf(
            "latents" to snrDb(less(latents, found.first), less(found.latents, found.first)),
            "picture" to (found.picture?.let { snrDb(picture, centred(it.pixels)) } ?: Double.NEGATIVE_INFINITY),
        )
        val floors = mapOf("latents" to spec.latents, "picture" to spec.picture)
        return SelfCheckResult(ratios, floors.mapValues { it.value.snrFloorDb.toDouble() })
    }

    /**
     * Throws Refused when this device is below the artifact's floor. A device that once passed is not asked again: its
     * [device] name, such as the chip's, and the manifest's hash are kept in [memory].
     */
    fun requireOnce(memory: File, device: String, cancellation: Cancellation = Cancellation()) {
        val line = "${sha256(File(artifact.folder, MANIFEST_NAME))} ${runtime.target} $device"
        if (memory.isFile && line in memory.readLines()) return
        val result = run(cancellation) ?: return
        result.failure?.let { refuse(it) }
        memory.appendText(line + "\n")
    }

    private fun expected(output: ExpectedOutput, bytes: Long): ByteArray {
        val file = artifact.file(output.file)
        if (file.length() != bytes) refuse("${output.file} has ${file.length()} bytes; $bytes are needed")
        return file.readBytes()
    }

    /** What a walk changed: of a few steps of many, most of the latents is still noise. */
    private fun less(latents: FloatArray, first: FloatArray) = FloatArray(latents.size) { latents[it] - first[it] }

    /** Levels as the decoder has them, in -1..1. */
    private fun centred(pixels: ByteArray) = FloatArray(pixels.size) { pixels[it].toUByte().toInt() / 127.5f - 1 }
}

/** 10 log10 of the expected numbers' power over that of the differences; below all floors for what is not finite. */
internal fun snrDb(expected: FloatArray, found: FloatArray): Double {
    if (found.any { !it.isFinite() }) return Double.NEGATIVE_INFINITY
    val signal = expected.sumOf { it.toDouble() * it }
    val difference = expected.indices.sumOf { index -> (expected[index].toDouble() - found[index]).let { it * it } }
    return if (difference == 0.0) Double.POSITIVE_INFINITY else 10 * log10(signal / difference)
}
