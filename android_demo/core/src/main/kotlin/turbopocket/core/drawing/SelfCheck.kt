// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.drawing

import turbopocket.core.artifact.Artifact
import turbopocket.core.artifact.MANIFEST_NAME
import turbopocket.core.artifact.SelfCheckSpec
import turbopocket.core.artifact.sha256
import turbopocket.core.refuse
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.log10

/** What a device's arithmetic came to: [snrDb] of signal over difference, infinite for none; [floorDb] is asked. */
data class SelfCheckResult(val snrDb: Double, val floorDb: Double) {
    val passed: Boolean get() = snrDb >= floorDb
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
        val found = Drawer(artifact, runtime).latents(Wish(spec.prompt, spec.seed), spec.step + 1, cancellation)
        val expected = expected(spec, found.size)
        return SelfCheckResult(snrDb(expected, found), spec.snrFloorDb.toDouble())
    }

    /**
     * Throws Refused when this device is below the artifact's floor. A device that once passed is not asked again: its
     * [device] name, such as the chip's, and the manifest's hash are kept in [memory].
     */
    fun requireOnce(memory: File, device: String, cancellation: Cancellation = Cancellation()) {
        val line = "${sha256(File(artifact.folder, MANIFEST_NAME))} ${runtime.target} $device"
        if (memory.isFile && line in memory.readLines()) return
        val result = run(cancellation) ?: return
        if (!result.passed) {
            refuse("this device computes wrong: ${decibel(result.snrDb)}, ${decibel(result.floorDb)} are needed")
        }
        memory.appendText(line + "\n")
    }

    private fun expected(spec: SelfCheckSpec, count: Int): FloatArray {
        val file = artifact.file(spec.file)
        if (file.length() != 4L * count) {
            refuse("${spec.file} has ${file.length()} bytes; $count latents have ${4 * count}")
        }
        val bytes = ByteBuffer.wrap(file.readBytes()).order(ByteOrder.LITTLE_ENDIAN)
        return FloatArray(count) { bytes.getFloat() }
    }

    private fun decibel(value: Double) = String.format(java.util.Locale.ROOT, "%.1f dB", value)
}

/** 10 log10 of the expected numbers' power over that of the differences; below all floors for what is not finite. */
internal fun snrDb(expected: FloatArray, found: FloatArray): Double {
    if (found.any { !it.isFinite() }) return Double.NEGATIVE_INFINITY
    val signal = expected.sumOf { it.toDouble() * it }
    val difference = expected.indices.sumOf { index -> (expected[index].toDouble() - found[index]).let { it * it } }
    return if (difference == 0.0) Double.POSITIVE_INFINITY else 10 * log10(signal / difference)
}
