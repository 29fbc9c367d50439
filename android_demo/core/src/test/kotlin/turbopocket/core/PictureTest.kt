// SPDX-License-Identifier: Apache-2.0
package turbopocket.core

import org.junit.jupiter.api.AfterAll
import org.junit.jupiter.api.Assertions.assertArrayEquals
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertFalse
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.DynamicTest
import org.junit.jupiter.api.DynamicTest.dynamicTest
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.TestFactory
import turbopocket.core.artifact.Artifact
import turbopocket.core.drawing.Drawer
import turbopocket.core.drawing.Picture
import turbopocket.core.drawing.Wish
import turbopocket.core.onnx.OnnxRuntime
import java.io.File
import javax.imageio.ImageIO
import kotlin.math.abs

/** Whole pictures beside Python's; with the property `operators` our codebook operators compute them. */
class PictureTest {
    private val runtime = OnnxRuntime(System.getProperty("operators")?.let(::File))
    private val drawer = Drawer(Artifact.open(File(Golden.all.artifact)), runtime)

    @TestFactory
    fun `pictures are Python's`(): List<DynamicTest> = Golden.all.pictures.map { case ->
        dynamicTest(case.prompt) {
            val found = drawer.draw(Wish(case.prompt, case.seed)).pixels
            val expected = File(Golden.folder, case.file).readBytes()
            assertEquals(expected.size, found.size)
            val worst = expected.indices.maxOf { abs(expected[it].toUByte().toInt() - found[it].toUByte().toInt()) }
            assertTrue(worst <= 1, "a value differs by $worst of 255")
        }
    }

    @Test
    fun `another seed is another picture`() {
        val (one, other) = listOf(1L, 2L).map { drawer.draw(Wish("a red circle", it)).pixels }
        assertFalse(one.contentEquals(other))
    }

    @Test
    fun `a PNG file holds the pixels`() {
        val picture = Picture(3, 5, ByteArray(45) { (it * 37).toByte() })
        val read = ImageIO.read(picture.png().inputStream())
        assertEquals(5 to 3, read.width to read.height)
        val pixels = ByteArray(45) { (read.getRGB(it / 3 % 5, it / 15) shr (16 - 8 * (it % 3))).toByte() }
        assertArrayEquals(picture.pixels, pixels)
    }

    @Test
    fun `what no text encoder reads is told`() {
        assertTrue(drawer.cut("a red circle").isEmpty())
        val cut = drawer.cut("word ".repeat(200))
        assertEquals(Artifact.open(File(Golden.all.artifact)).manifest.tokenizers.keys, cut.keys)
    }

    companion object {
        @JvmStatic
        @AfterAll
        fun tellMemory() {
            val peak = File("/proc/self/status").takeIf { it.isFile }?.readLines()?.find { it.startsWith("VmHWM") }
            println("peak resident memory of this JVM: ${peak?.substringAfter(':')?.trim()}")
        }
    }
}
