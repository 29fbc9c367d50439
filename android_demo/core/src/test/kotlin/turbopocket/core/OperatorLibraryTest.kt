// SPDX-License-Identifier: Apache-2.0
package turbopocket.core

import org.junit.jupiter.api.Assumptions.assumeTrue
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import org.junit.jupiter.params.ParameterizedTest
import org.junit.jupiter.params.provider.ValueSource
import turbopocket.core.artifact.Artifact
import turbopocket.core.drawing.Drawer
import turbopocket.core.drawing.Wish
import turbopocket.core.onnx.OnnxRuntime
import turbopocket.core.onnx.requireWhole
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** A library of operators that is not whole, which would end the process when it is registered. */
class OperatorLibraryTest {
    @TempDir lateinit var folder: File

    private val library get() = File(folder, "liboperators.so")

    private fun draw() =
        Drawer(Artifact.open(File(Golden.all.artifact)), OnnxRuntime(library)).draw(Wish("a red circle", 0))

    @ParameterizedTest
    @ValueSource(doubles = [0.0001, 0.01, 0.3, 0.5, 0.9, 0.9999])
    fun `a library that was cut off is refused before it is registered`(share: Double) {
        val whole = File(System.getProperty("java.home"), "lib/libjava.so")
        assumeTrue(whole.isFile)
        requireWhole(whole)
        val content = whole.readBytes()
        library.writeBytes(content.copyOf(maxOf(4, (content.size * share).toInt())))
        assertRefused("liboperators.so is cut off: it has") { draw() }
    }

    @Test
    fun `what is no library, or not there, is refused in a sentence`() {
        assertRefused("liboperators.so is missing") { draw() }
        library.writeText("no library")
        assertRefused("ONNX Runtime") { draw() }
    }

    @ParameterizedTest
    @ValueSource(booleans = [true, false])
    fun `each kind of header is read`(wide: Boolean) {
        for (order in listOf(ByteOrder.LITTLE_ENDIAN, ByteOrder.BIG_ENDIAN)) {
            val head = header(wide, order, loaded = 500)
            library.writeBytes(head.copyOf(500))
            requireWhole(library)
            library.writeBytes(head.copyOf(499))
            assertRefused("is cut off") { requireWhole(library) }
        }
    }

    /** One segment of [loaded] bytes right behind the header, and no sections. */
    private fun header(wide: Boolean, order: ByteOrder, loaded: Int): ByteArray {
        val bytes = ByteBuffer.allocate(200).order(order)
        fun words(vararg values: Int) = values.forEach { if (wide) bytes.putLong(it.toLong()) else bytes.putInt(it) }
        val (size, segment) = if (wide) 64 to 56 else 52 to 32
        bytes.put(byteArrayOf(0x7F, 'E'.code.toByte(), 'L'.code.toByte(), 'F'.code.toByte()))
        bytes.put(if (wide) 2 else 1).put(if (order == ByteOrder.LITTLE_ENDIAN) 1 else 2).position(16)
        bytes.putShort(3).putShort(62).putInt(1)
        words(0, size, 0)
        bytes.putInt(0)
        for (each in listOf(size, segment, 1, 0, 0, 0)) bytes.putShort(each.toShort())
        bytes.putInt(1)
        if (wide) bytes.putInt(5)
        words(0, 0, 0, loaded, loaded)
        return bytes.array()
    }
}
