// SPDX-License-Identifier: Apache-2.0
package turbopocket.core

import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.DynamicTest
import org.junit.jupiter.api.DynamicTest.dynamicTest
import org.junit.jupiter.api.TestFactory
import turbopocket.core.drawing.Walk
import turbopocket.core.noise.StandardNormal
import turbopocket.core.text.ClipTokenizer
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.security.MessageDigest
import java.text.Normalizer
import kotlin.math.abs

/** The core beside Python. */
class GoldenTest {
    @TestFactory
    fun `ids are those of the tokenizers library`(): List<DynamicTest> = Golden.all.tokenizers.map { tokenizer ->
        dynamicTest(tokenizer.name) {
            val ours = ClipTokenizer(File(tokenizer.file), tokenizer.length)
            assertTrue(tokenizer.cases.size >= 500)
            for (case in tokenizer.cases) {
                val found = ours.encode(case.prompt)
                assertEquals(case.ids, found.ids.toList(), case.prompt)
                assertEquals(case.mask, found.mask.toList(), case.prompt)
                val composed = Normalizer.isNormalized(case.prompt, Normalizer.Form.NFC)
                if (composed) assertEquals(case.cut, found.cut) else assertEquals(case.cut == null, found.cut == null)
            }
        }
    }

    @TestFactory
    fun `noise is numpy's to the bit`(): List<DynamicTest> = Golden.all.noise.map { case ->
        dynamicTest("seed ${case.seed}") {
            val values = StandardNormal(case.seed).next(case.count)
            val bytes = ByteBuffer.allocate(4 * values.size).order(ByteOrder.LITTLE_ENDIAN)
            values.forEach(bytes::putFloat)
            assertEquals(case.tail, values.count { abs(it) > 3.6541529f })
            val digest = MessageDigest.getInstance("SHA-256").digest(bytes.array())
            assertEquals(case.sha256, digest.joinToString("") { "%02x".format(it) })
        }
    }

    @TestFactory
    fun `steps by the table are the samplers' steps`(): List<DynamicTest> = Golden.walks.map { case ->
        dynamicTest(case.kind) {
            lateinit var noise: FloatArray
            val walk = Walk(case.table) { noise }
            for ((row, step) in case.table.rows.zip(case.steps)) {
                noise = step.noise.toFloatArray()
                val x = step.x.toFloatArray()
                val scale = maxOf(1f, step.x.maxOf(::abs), step.next.maxOf(::abs))
                requireClose(step.seen, walk.input(row, x), scale)
                requireClose(step.next, walk.step(row, x, step.output.toFloatArray()), scale)
            }
        }
    }

    private fun requireClose(expected: List<Float>, found: FloatArray, scale: Float) {
        val worst = expected.indices.maxOf { abs(expected[it] - found[it]) } / scale
        assertTrue(worst <= 1e-6f, "differs by $worst of the largest")
    }
}
