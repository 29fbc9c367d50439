// SPDX-License-Identifier: Apache-2.0
package turbopocket.app

import android.app.ActivityManager
import android.content.Context
import android.os.Build
import turbopocket.core.artifact.Artifact
import turbopocket.core.drawing.Cancellation
import turbopocket.core.drawing.Drawer
import turbopocket.core.drawing.Picture
import turbopocket.core.drawing.Progress
import turbopocket.core.drawing.SelfCheck
import turbopocket.core.drawing.Wish
import turbopocket.core.onnx.OnnxRuntime
import java.io.File

/** What happens off the screen's thread, one thing at a time. */
class Work(private val context: Context) {
    val models = Models(File(context.filesDir, "models"))

    /** Bytes that may be used before the system begins to end apps. */
    fun freeBytes(): Long {
        val found = ActivityManager.MemoryInfo()
        (context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager).getMemoryInfo(found)
        return (found.availMem - found.threshold).coerceAtLeast(0)
    }

    /** The picture of a wish, once this device was found to compute right. */
    fun draw(folder: File, wish: Wish, cancellation: Cancellation, progress: (Progress) -> Unit): Picture {
        val artifact = Artifact.open(folder)
        val runtime = OnnxRuntime(operators(), freeBytes = ::freeBytes)
        val device = "${Build.MANUFACTURER} ${Build.MODEL} ${Build.HARDWARE} ${Build.VERSION.SDK_INT}"
        SelfCheck(artifact, runtime).requireOnce(File(context.filesDir, "self_checks"), device, cancellation)
        return Drawer(artifact, runtime).draw(wish, cancellation, progress)
    }

    /** The codebook operators, where the app was built with them. */
    private fun operators(): File? =
        File(context.applicationInfo.nativeLibraryDir, "libcodebook_onnxruntime.so").takeIf { it.isFile }
}
